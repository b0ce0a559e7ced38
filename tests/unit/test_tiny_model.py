import json
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.tokenizer.continuous_token import QwenContinuousTokenBuilder

from verl_sspo.quickstart import model as tiny_model
from verl_sspo.quickstart.model import create_model, create_tokenizer, prepare_arithmetic, warm_up

TOKENIZER = create_tokenizer()
TINY = {"digits": 1, "train_size": 40, "val_size": 10, "warm_up_steps": 2, "warm_up_batch": 4}


# Qwen2's tokenizer normalises to NFC. UTF-8 has no lone surrogates.
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text))
def test_one_token_a_byte(text):
    text = unicodedata.normalize("NFC", text)
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_special_tokens():
    assert len(TOKENIZER) == 258
    assert TOKENIZER.decode(TOKENIZER.eos_token_id) == "<|im_end|>"
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    assert TOKENIZER("1=<|im_end|>")["input_ids"][-1] == TOKENIZER.eos_token_id


def test_chat_template_is_the_text_and_what_verl_asks_of_it():
    messages = [{"role": "user", "content": "12+34="}]
    for generation_prompt in (True, False):
        assert (
            TOKENIZER.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=False) == "12+34="
        )
    messages.append({"role": "assistant", "content": "46"})
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "12+34=46<|im_end|>"
    # verl's builder for Qwen2 models refuses a tokenizer without <|im_end|> or with a newline of several tokens.
    builder = QwenContinuousTokenBuilder(TOKENIZER)
    assert builder.build_initial_tokens(messages[:1]) == TOKENIZER("12+34=")["input_ids"]


def test_model_is_small_seeded_and_fits_the_tokenizer():
    model = create_model(TOKENIZER, seed=0)
    assert model.config.vocab_size == len(TOKENIZER)
    assert model.num_parameters() == 132_288
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    state = torch.get_rng_state()
    same, other = create_model(TOKENIZER, seed=0), create_model(TOKENIZER, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_with_two_heads_their_size_is_the_width_over_the_heads():
    model = create_model(TOKENIZER, seed=0, heads=2)
    assert model.config.hidden_size // model.config.num_attention_heads == model.config.head_dim == 32
    # Each of the two layers loses half of q, k, v (with bias) and o: 2 * (3 * (64 * 64 + 64) + 64 * 64) parameters.
    assert model.num_parameters() == 132_288 - 33_152


def test_warm_up_teaches_the_responses_and_not_the_prompts():
    def loss_of(text, from_token):
        ids = TOKENIZER(text + TOKENIZER.eos_token, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, :from_token] = -100
        with torch.no_grad():
            return model(input_ids=ids, labels=labels).loss.item()

    model = create_model(TOKENIZER, seed=0)
    rng = random.Random(0)
    # The response to `a=` and to `b=` is always the same. Which of them comes, and so the length, is random.
    pairs = [("a=", "xy"), ("b=", "zzzz")]
    before = loss_of("a=xy", 2)
    threads = torch.get_num_threads()
    warm_up(model, TOKENIZER, lambda: rng.choices(pairs, k=8), steps=60)
    assert torch.get_num_threads() == threads
    assert before > 4
    assert loss_of("a=xy", 2) < 0.1
    assert loss_of("b=zzzz", 2) < 0.1
    # The model has not learnt the `=` after `a`: it is part of the prompt.
    labels_on_prompt = TOKENIZER("a=", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(input_ids=labels_on_prompt, labels=labels_on_prompt).loss.item() > 2


def test_task_is_made_once_and_again_when_its_parameters_change(tmp_path):
    folder = prepare_arithmetic(tmp_path, **TINY)
    assert folder == tmp_path / "digits1-seed0"
    weights = folder / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert prepare_arithmetic(tmp_path, **TINY) == folder
    assert weights.stat().st_mtime_ns == written

    assert prepare_arithmetic(tmp_path, **TINY, seed=1) == tmp_path / "digits1-seed1"
    assert weights.stat().st_mtime_ns == written

    prepare_arithmetic(tmp_path, **TINY | {"warm_up_steps": 3})
    assert weights.stat().st_mtime_ns != written
    assert json.loads((folder / "made_with.json").read_text())["warm_up_steps"] == 3
    # Nothing unfinished is left behind.
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["digits1-seed0", "digits1-seed1"]


def test_a_task_that_two_want_is_made_once(tmp_path, monkeypatch):
    made = []
    warm_up = tiny_model.warm_up
    monkeypatch.setattr(tiny_model, "warm_up", lambda *args, **options: [made.append(0), warm_up(*args, **options)])
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: prepare_arithmetic(tmp_path, **TINY), range(2)))
    assert len(made) == 1
    assert folders == [tmp_path / "digits1-seed0"] * 2
    assert AutoModelForCausalLM.from_pretrained(folders[0] / "model").dtype == torch.float32


def test_task_is_repeatable_and_loads_as_verl_loads_it(tmp_path):
    first, second = (prepare_arithmetic(tmp_path / name, **TINY) for name in "ab")
    for name in ("model/model.safetensors", "model/tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    tokenizer = hf_tokenizer(str(first / "model"))
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab() == AutoTokenizer.from_pretrained(first / "model").get_vocab()
    assert tokenizer.chat_template == TOKENIZER.chat_template
    model = AutoModelForCausalLM.from_pretrained(first / "model")
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_nothing_is_left_of_a_task_that_cannot_be_made(tmp_path):
    with pytest.raises(ValueError, match="only 81"):
        prepare_arithmetic(tmp_path, **TINY | {"train_size": 100})
    assert list(tmp_path.glob("[!.]*")) == []
