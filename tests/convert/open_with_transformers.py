"""Opens an exported directory with whatever transformers is installed, and says in JSON what it found.

    python open_with_transformers.py DIR QUESTIONS.json

Needs torch and transformers only: it is run under several versions of them, none of which has this project. All keys
of QUESTIONS.json are optional:

    ids         list of rows of token ids, of one length: the prompt of `logits` and `generated`
    logits      .npy file of the expected logits of these rows, [rows, length, vocabulary]
    new_tokens  how many tokens to generate greedily
    texts       list of strings to tokenize
    chat        list of messages {"role", "content"} for the chat template

The answer holds `transformers`, `class`, `dtype`, `relative_error` (Euclidean norm), `max_difference` and `largest` (of
logits in float32), `generated`, `token_ids`, `decoded`, `chat`. Exits with 1 and one line if a key is missing,
unexpected or of another shape.
"""

import json
import sys
from typing import Any


def main(directory: str, questions: str) -> int:
    """Answers the questions on standard output; 0, or 1 where the weights do not fit the class."""
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with open(questions, encoding="utf-8") as file:
        asked = json.load(file)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        print(f"transformers {transformers.__version__}: {directory} does not fit: {wrong}", file=sys.stderr)
        return 1
    answer: dict[str, Any] = {"transformers": transformers.__version__, "class": type(model).__name__}
    answer["dtype"] = str(transformers.AutoConfig.from_pretrained(directory).dtype).removeprefix("torch.")
    model.eval()
    with torch.no_grad():
        if "ids" in asked:
            ids = torch.tensor(asked["ids"])
        if "logits" in asked:
            expected = np.load(asked["logits"], allow_pickle=False).astype(np.float64)
            logits = model(input_ids=ids).logits.double().numpy()
            answer |= {
                "relative_error": float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)),
                "max_difference": float(np.abs(logits - expected).max()),
                "largest": float(np.abs(expected).max()),
            }
        if asked.get("new_tokens"):
            model.generation_config.eos_token_id = None  # as many tokens as asked for, whatever they are
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asked["new_tokens"],
                do_sample=False,
            )
            answer["generated"] = out[:, ids.shape[1] :].tolist()
    if "texts" in asked or "chat" in asked:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        answer["tokenizer"] = type(tokenizer).__name__
        answer["special_ids"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        answer["token_ids"] = [tokenizer(text)["input_ids"] for text in asked.get("texts", [])]
        answer["decoded"] = [tokenizer.decode(row) for row in answer["token_ids"]]
        if "chat" in asked:
            answer["chat"] = tokenizer.apply_chat_template(
                asked["chat"], tokenize=False, add_generation_prompt=True
            )
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
