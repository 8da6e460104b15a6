"""A name that is neither here nor on the Hub costs one question and one error, not minutes of retries."""

import huggingface_hub
import pytest
from hub_server import LoopbackHub

from hf_vqgan.app.playground import load_model
from hf_vqgan.conversion.convert import load_original
from hf_vqgan.data.images import load_splits
from hf_vqgan.evaluation.autoencoders import load_autoencoder
from hf_vqgan.files.sources import HTTPError, check_source
from hf_vqgan.generation.encoded_dataset import EncodingConfig, encode_dataset
from hf_vqgan.losses.backbones import VisionBackbone


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """The Hub's name cannot be resolved, nothing is cached; every request is counted."""
    asked = []

    def refuse(self, name, **options):
        asked.append(name)
        raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("retried"))
    monkeypatch.chdir(tmp_path)
    return asked


LOADERS = {
    "evaluated model": load_autoencoder,
    "checkpoint to convert": load_original,
    "dataset": load_splits,
    "encoder": lambda name: encode_dataset(name, "photos", "out", EncodingConfig()),
    "playground": load_model,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_mistyped_name_offline_is_one_question(unreachable, load):
    with pytest.raises(OSError, match=r"'runs/mistyped': no such file or folder here, and the Hub cannot be reached"):
        load("runs/mistyped")
    assert unreachable == ["runs/mistyped"]


def test_mistyped_backbone_is_one_question(unreachable):
    with pytest.raises(ValueError, match="disc_backbone='vit/typo' cannot be loaded.*the Hub cannot be reached"):
        VisionBackbone("vit/typo", "disc_backbone", "another one")
    assert unreachable == ["vit/typo"]


@pytest.mark.parametrize("name", ["./photos", "runs/mine/checkpoint-10", "/data/photos"])
def test_what_can_only_be_a_path_is_not_asked_for(unreachable, name):
    with pytest.raises(FileNotFoundError, match="no such file or folder here, and names on the Hub have the form"):
        check_source(name)
    assert unreachable == []


def test_pattern_of_files_that_are_not_there(unreachable):
    with pytest.raises(FileNotFoundError, match=r"dataset 'shards/\*.tar': there are no such files"):
        load_splits("shards/*.tar")


def test_hub_that_answers(tmp_path):
    """In a process of its own, since the Hub's address is read at import."""
    hub = LoopbackHub()
    try:
        code = """
from hf_vqgan.files.sources import check_source
from huggingface_hub import HfApi
HfApi().create_repo("user/there")
check_source("user/there")
try:
    check_source("user/there", "dataset")
except FileNotFoundError as error:
    print(error)
"""
        found = hub.run(code, tmp_path)
    finally:
        hub.close()
    assert (
        "dataset 'user/there': no such file or folder here, and the Hub has no dataset repository user/there" in found
    )
