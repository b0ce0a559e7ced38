"""`verl-sspo prepare-model`: what it writes, and what it says if there is no model."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from verl_sspo.data import language_model
from verl_sspo.quickstart.model import create_model, create_tokenizer


@pytest.fixture
def local(tmp_path):
    """A local Hugging Face folder with a tiny model, in place of the 135M parameters."""
    folder = tmp_path / "source"
    tokenizer = create_tokenizer()
    create_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_folder_becomes_a_model_that_ends_at_line_breaks(local, tmp_path, capsys):
    output = tmp_path / "models" / "line"
    arguments = ["smollm2-135m", "--source", str(local), "--end-at-line-break", "--output", str(output)]
    assert language_model.main(arguments) == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    AutoModelForCausalLM.from_pretrained(output)
    ends = GenerationConfig.from_pretrained(output).eos_token_id
    assert ends == [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False).input_ids]
    assert "Apache License 2.0" in (output / "MODEL.md").read_text()
    assert language_model.main(arguments) == 0
    assert "is there already" in capsys.readouterr().out


def test_a_folder_that_somebody_else_made_is_not_written_to(local, tmp_path):
    with pytest.raises(SystemExit):
        language_model.main(["smollm2-135m", "--source", str(local), "--output", str(tmp_path)])


def no_network(*_, **__):
    raise LocalEntryNotFoundError("cannot find the appropriate snapshot folder")


@pytest.mark.parametrize("source", ["package", "hub", "/nowhere"])
def test_a_missing_source_says_what_to_do_and_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_model, "package_folder", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    # Loading would try every file on the hub for half a minute.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("tried to load"))
    assert language_model.main(["smollm2-135m", "--source", source, "--output", str(tmp_path / "m" / "x")]) == 1
    error = capsys.readouterr().err
    assert "pip install" in error or "give one" in error
    assert not list((tmp_path / "m").iterdir())


def test_a_damaged_package_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / language_model.GGUF).write_bytes(b"GGUF, or not")
    monkeypatch.setattr(language_model, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(language_model, "find_spec", lambda name: name)
    assert language_model.main(["smollm2-135m", "--output", str(tmp_path / "m" / "x")]) == 1
    assert "install it again" in capsys.readouterr().err
