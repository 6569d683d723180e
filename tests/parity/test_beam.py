"""Beam search in both frameworks against transformers' own, token for token, in float64."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from helpers import QUICK, float64, random_params, relative_error, tiny  # noqa: E402
from helpers import V as TINY_V  # noqa: E402
from hf64 import double_precision  # noqa: E402
from hf_models import CASES, build  # noqa: E402
from tolerances import tolerance  # noqa: E402

import jaxlm.beam  # noqa: E402
import torchref.beam  # noqa: E402
from convert import hf, native, stream  # noqa: E402
from jaxlm.model import Split, abstract_model  # noqa: E402
from jaxlm.sampling import Answer, Sampling  # noqa: E402

pytestmark = pytest.mark.torch

V, PAD = 40, 39
MANY = 50
# Cases of the default run; the last four end otherwise when a rule for stopping early is broken.
FEW = [*range(8), 36, 52, 84, 93]
EARLY = {"no": False, "yes": True, "never": "never"}


class Kind(NamedTuple):
    """What jax compiles for: cases of one kind share their programs."""

    model: str
    num_beams: int
    stop: tuple[int, ...]
    ngram: int
    repetition: bool


KINDS = [
    Kind("llama", 4, (0, 2), 0, False),
    Kind("mistral", 2, (1,), 2, False),  # a window, and so a ring in the cache
    Kind("mixtral", 3, (0, 1, 2), 2, True),
    Kind("llama", 5, (), 0, True),
]


class Case(NamedTuple):
    """One search."""

    kind: Kind
    prompts: list[list[int]]
    settings: Sampling


class Models(NamedTuple):
    """One model three times."""

    theirs: Any
    jaxlm: Split
    torchref: Any


def case(number: int) -> Case:
    """A random search: kinds in turn, all else drawn."""
    drawn = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    prompts = [[drawn.randrange(3, PAD) for _ in range(drawn.randint(1, 6))] for _ in range(3)]
    settings = Sampling(
        max_new_tokens=drawn.choice([1, 2, 6, 10, 10]),
        num_beams=kind.num_beams,
        samples=drawn.randint(1, kind.num_beams),
        length_penalty=drawn.choice([-1.5, -0.3, 0.0, 0.5, 1.0, 2.5]),
        early_stopping=drawn.choice(list(EARLY)),
        no_repeat_ngram=kind.ngram,
        repetition_penalty=drawn.choice([0.8, 1.4]) if kind.repetition else 1.0,
        stop=kind.stop,
        logprobs=True,
    )
    return Case(kind, prompts, settings)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Compiles the tiny models without optimising them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The models by name, built once."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    @functools.cache
    def get(name: str) -> Models:
        directory: Path = tmp_path_factory.mktemp(name)
        with double_precision(*CASES[name].modules):
            theirs = build(CASES[name], None, vocab_size=V, num_hidden_layers=2).eval()
            with torch.no_grad():
                theirs.lm_head.weight[:3] *= 2  # so that answers end now and then
            theirs.save_pretrained(directory)
        source = hf.read(directory)
        params = {path: stream.array(planned) for path, planned in source.tensors.items()}
        with float64():
            graphdef = abstract_model(source.config).graphdef
            split = Split(graphdef, {path: jnp.asarray(value) for path, value in params.items()})
        return Models(theirs, split, native.build_torch(source.config, params))

    return get


def transformers_answers(model: Any, case: Case) -> list[list[Answer]]:
    """generate's sequences and scores; no n-grams of padding: where they count, one prompt at a time."""
    groups = [[prompt] for prompt in case.prompts] if case.kind.ngram else [case.prompts]
    s, answers = case.settings, []
    for prompts in groups:
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model.generation_config.eos_token_id = None
        with double_precision(*CASES[case.kind.model].modules):
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                num_beams=s.num_beams,
                num_return_sequences=s.samples,
                max_new_tokens=s.max_new_tokens,
                length_penalty=s.length_penalty,
                early_stopping=EARLY[s.early_stopping],
                repetition_penalty=s.repetition_penalty,
                no_repeat_ngram_size=s.no_repeat_ngram,
                eos_token_id=list(s.stop) or None,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                output_scores=True,
            )
        found = []
        for row, score in zip(out.sequences[:, longest:].tolist(), out.sequences_scores.tolist()):
            end = next((i for i, token in enumerate(row) if token in s.stop), None)
            found.append(Answer(row[:end], [], "length" if end is None else "stop", score))
        answers += [found[i : i + s.samples] for i in range(0, len(found), s.samples)]
    return answers


def check(case: Case, ours: list[list[Answer]], theirs: list[list[Answer]]) -> None:
    """The same ids in the same order, the same ends, the same scores."""
    for mine, other in zip(ours, theirs, strict=True):
        assert [a.ids for a in mine] == [a.ids for a in other], case
        assert [a.finish for a in mine] == [a.finish for a in other], case
        scores = [a.score for a in mine], [a.score for a in other]
        assert relative_error(*scores) <= tolerance("f64_transformers"), case
        assert all(len(a.logprobs) == len(a.ids) for a in mine)


def compare(models: Any, number: int) -> list[list[Answer]]:
    """Both frameworks' search against transformers'."""
    drawn = case(number)
    model = models(drawn.kind.model)
    theirs = transformers_answers(model.theirs, drawn)
    check(drawn, torchref.beam.beam_search(model.torchref, drawn.prompts, drawn.settings), theirs)
    with float64():
        ours = jaxlm.beam.beam_search(model.jaxlm, drawn.prompts, drawn.settings)
    check(drawn, ours, theirs)
    return ours


def test_beam_search_is_transformers(models: Any) -> None:
    """Unequal prompts, several stop ids, penalties of both signs, all ways to stop early."""
    found = [answer for number in FEW for best in compare(models, number) for answer in best]
    ends = np.mean([answer.finish == "stop" for answer in found])
    assert 0.1 < ends < 0.9, "the cases have to end in both ways"


@pytest.mark.slow
def test_beam_search_is_transformers_on_many_cases(models: Any) -> None:
    """As above, 50 cases."""
    for number in range(MANY):
        compare(models, number)


def test_logprobs_are_the_models_own(models: Any) -> None:
    """Log-softmax of the raw logits, penalties or not, against one forward over prompt and answer."""
    drawn = case(2)  # with penalties
    model = models(drawn.kind.model)
    with float64():
        ours = jaxlm.beam.beam_search(model.jaxlm, drawn.prompts, drawn.settings)
    theirs = torchref.beam.beam_search(model.torchref, drawn.prompts, drawn.settings)
    for prompt, mine, other in zip(drawn.prompts, ours, theirs):
        for answer, twin in zip(mine, other):
            whole = torch.tensor([prompt + answer.ids])
            with torch.no_grad():
                logs = model.torchref(whole)[0][0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logs.gather(1, torch.tensor(answer.ids)[:, None])[:, 0].numpy()
            for got in (answer.logprobs, twin.logprobs):
                assert relative_error(got, expected) <= tolerance("f64_decode")


def test_ties_go_to_the_earlier_beam_and_the_lower_id(models: Any) -> None:
    """Of a model that finds everything equally likely, both frameworks take the same answers."""
    drawn = case(4)
    model = models(drawn.kind.model)
    params = {
        path: jnp.zeros_like(value) if "head" in path else value for path, value in model.jaxlm.params.items()
    }
    flat = native.build_torch(model.torchref.config, params)
    with float64():
        ours = jaxlm.beam.beam_search(model.jaxlm._replace(params=params), drawn.prompts, drawn.settings)
    theirs = torchref.beam.beam_search(flat, drawn.prompts, drawn.settings)
    check(drawn, ours, theirs)
    assert [a.ids for a in ours[0]] == [a.ids for a in ours[1]]


def test_beams_go_on_though_more_stop_ids_than_beams_are_likelier() -> None:
    """Logits of a bias alone, four stop ids on top: three beams still begin with the three next best."""
    config = tiny(n_layers=1, tied=True, head_bias=True)
    params = random_params(config) | {
        "embed.weight": np.zeros((TINY_V, 24)),
        "head_bias": -np.arange(TINY_V) / 8,
    }
    params["head_bias"][:4] += [9, 8, 7, 6]
    settings = Sampling(
        2, num_beams=3, samples=3, stop=(0, 1, 2, 3), length_penalty=9.0, early_stopping="never"
    )
    theirs = torchref.beam.beam_search(native.build_torch(config, params), [[5]], settings)
    with float64():
        split = Split(abstract_model(config).graphdef, {k: jnp.asarray(v) for k, v in params.items()})
        ours = jaxlm.beam.beam_search(split, [[5]], settings)
    for answers in (ours, theirs):
        assert [(answer.ids, answer.finish) for answer in answers[0]] == [([i], "stop") for i in (4, 5, 6)]
