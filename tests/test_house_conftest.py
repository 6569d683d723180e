"""The surroundings that conftest.py promises to every test."""

import os
import socket
import subprocess
import sys

import pytest


def test_jax_sees_eight_cpu_devices() -> None:
    """Sharding is tested on eight devices, also in what a test starts as a subprocess."""
    jax = pytest.importorskip("jax")
    if os.environ.get("JAXLM_TEST_GPU") == "1":
        pytest.skip("the real devices were asked for")
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8
    command = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "8"
    )


def test_x64_is_on_inside_the_fixture(x64: None) -> None:
    """The fixture gives float64 arrays without changing the test's own code."""
    jnp = pytest.importorskip("jax.numpy")
    assert jnp.ones(2).dtype == "float64"


def test_x64_is_off_outside_the_fixture() -> None:
    """float64 does not leak from a test to the next."""
    jnp = pytest.importorskip("jax.numpy")
    assert jnp.ones(2).dtype == "float32"


def test_accidental_broadcasting_raises_under_strict_ranks(strict_ranks: None) -> None:
    """[3] + [2, 3] is an error inside the fixture, [2, 3] + 1 is not."""
    jnp = pytest.importorskip("jax.numpy")
    assert (jnp.ones((2, 3)) + 1).shape == (2, 3)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones(3) + jnp.ones((2, 3))


def test_implicit_promotion_raises_under_strict_dtypes(strict_dtypes: None) -> None:
    """bfloat16 + float32 is an error inside the fixture."""
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, "bfloat16") + jnp.ones(2, "float32")


def test_network_is_refused_and_loopback_is_not() -> None:
    """Connections and look-ups beyond this machine raise before a packet leaves; loopback works."""
    outside = ("192.0.2.1", 9)
    with socket.socket() as plain:
        for act in (
            lambda: socket.create_connection(outside, timeout=0.1),
            lambda: plain.connect(outside),
            lambda: plain.connect_ex(outside),
            lambda: socket.getaddrinfo("host.invalid", 80),
        ):
            with pytest.raises(PermissionError, match="tests use no network"):
                act()
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_shapes_are_executed() -> None:
    """A [B, D] where a signature says [B, T, D] is refused while the tests run."""
    pytest.importorskip("beartype")
    jaxtyping = pytest.importorskip("jaxtyping")
    jnp = pytest.importorskip("jax.numpy")
    from jaxlm.loss import token_loss

    weight, targets, mask = jnp.zeros((8, 5)), jnp.zeros((2, 3), int), jnp.ones((2, 3))
    token_loss(jnp.zeros((2, 3, 8)), weight, None, targets, mask)
    with pytest.raises(jaxtyping.TypeCheckError, match="hidden"):
        token_loss(jnp.zeros((2, 8)), weight, None, targets, mask)
