from tests.sampling.conftest import noise, noises  # noqa: F401
