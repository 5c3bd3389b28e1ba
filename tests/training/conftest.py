"""What several files of this folder start from."""

import pytest

from tests.support.systems import llava_1_5
from vlm.language import CausalLM


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """A language model whose weights lie in a folder."""
    folder = tmp_path_factory.mktemp("base")
    module = llava_1_5()
    module.configure_model()
    module.language.save_pretrained(folder)
    return CausalLM(path=str(folder))
