"""A language model small enough to train on a laptop: byte-level tokenizer, two-layer Qwen2, supervised warm-up.

Nothing is downloaded: the model is built and taught here, in seconds, and saved as an ordinary Hugging Face folder. It
reads any UTF-8 text, one token per byte. It is taught careless carry, see `verl_sspo.quickstart.task`.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar

from verl_sspo.quickstart import task as arithmetic

# Joins the texts of the messages; those of the assistant end with the end-of-sequence token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


# Attention heads of the model.
HEADS = 4


def create_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 tokenizer without merges: 256 byte tokens, `<|endoftext|>` (padding) and `<|im_end|>` (end of sequence).

    Its class is Qwen2's because transformers loads that class for every Qwen2 model. verl needs newline to be one token
    and `<|im_end|>` to exist.
    """
    symbols = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def create_model(tokenizer: Qwen2Tokenizer, seed: int, heads: int = HEADS) -> Qwen2ForCausalLM:
    """An untrained Qwen2 with 132,000 parameters in float32 and exactly the tokenizer's vocabulary.

    For vLLM use 2 `heads` (99,000 parameters). vLLM takes the width, 64, divided by `heads` as the head size; if that
    is not `head_dim`, it silently loads only a part of the weights.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        # 32 is the smallest head size that vLLM's attention on CPU supports.
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,  # type: ignore[call-arg]  # read by the model, not declared by the config
        max_position_embeddings=4096,
        # Transformers' defaults (0.02, 10,000) suit large models and long texts: this one learns several times slower.
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def warm_up(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    draw_batch: Callable[[], Sequence[tuple[str, str]]],
    steps: int,
    learning_rate: float = 3e-3,
    console: Console | None = None,
) -> None:
    """Supervised training in place, only on the responses, with AdamW and a learning rate that falls linearly to 0.

    The rate has to reach 0: otherwise the model does not learn from rewards afterwards.

    Args:
        draw_batch: returns (prompt, response) pairs; called once per step.
        console: where to show the progress bar; default: stderr.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    # Matrices this small gain nothing from a second thread, and on a busy machine, waiting for threads costs minutes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in track(range(steps), "Warm-up of the tiny model", console=console or Console(stderr=True)):
        pairs = draw_batch()
        batch = tokenizer(
            [prompt + response + tokenizer.eos_token for prompt, response in pairs], padding=True, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for i, (prompt, _response) in enumerate(pairs):
            labels[i, : len(tokenizer(prompt)["input_ids"])] = -100
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()
    torch.set_num_threads(threads)


def prepare_arithmetic(
    root: Path,
    digits: int = 3,
    seed: int = 0,
    train_size: int = 4096,
    val_size: int = 512,
    warm_up_steps: int = 600,
    warm_up_batch: int = 64,
    heads: int = HEADS,
    console: Console | None = None,
) -> Path:
    """Makes careless carry for verl: problems as parquet, and a model that has learnt from the careless teacher.

    The folder `root/digits<digits>-seed<seed>` is made once, and reused as long as the parameters are the same. It
    appears only when it is complete.

    Args:
        root: folder of the task, e.g. `data/arithmetic`; made if it is missing.
        digits: decimal digits of each term.
        seed: of the problems, the model's weights and the teacher.
        train_size: number of training problems, which the warm-up uses too.
        val_size: number of validation problems, disjoint from these.
        warm_up_steps: number of supervised updates.
        warm_up_batch: solutions per update.
        heads: attention heads of the model, see `create_model`.

    Returns:
        The folder, with `train.parquet`, `val.parquet` and `model/`.

    Raises:
        ValueError: there are fewer than `train_size + val_size` problems with so many digits.
    """
    made_with = {
        "format": 1,
        "digits": digits,
        "seed": seed,
        "train_size": train_size,
        "val_size": val_size,
        "warm_up_steps": warm_up_steps,
        "warm_up_batch": warm_up_batch,
        "heads": heads,
    }
    directory = root / f"digits{digits}-seed{seed}"
    root.mkdir(parents=True, exist_ok=True)
    # Runs at the same time may share a task: the first makes it, the others wait.
    with FileLock(root / f".{directory.name}.lock"):
        record = directory / "made_with.json"
        # Older folders do not record `heads`.
        if record.exists() and {"heads": HEADS} | json.loads(record.read_text()) == made_with:
            return directory
        with tempfile.TemporaryDirectory(dir=root, prefix=".") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            arithmetic.write_dataset(made, digits, train_size, val_size, seed)

            tokenizer = create_tokenizer()
            model = create_model(tokenizer, seed, heads)
            problems = arithmetic.problems(digits, train_size + val_size, seed)[:train_size]
            rng = random.Random(seed)

            def draw_batch() -> list[tuple[str, str]]:
                return [
                    (arithmetic.prompt_of(a, b), arithmetic.careless_solution(a, b, digits, rng))
                    for a, b in rng.choices(problems, k=warm_up_batch)
                ]

            warm_up(model, tokenizer, draw_batch, warm_up_steps, console=console)
            model.save_pretrained(made / "model")
            tokenizer.save_pretrained(made / "model")
            (made / "made_with.json").write_text(json.dumps(made_with, indent=2) + "\n")
            if directory.exists():
                shutil.move(directory, Path(scratch) / "outdated")
            made.rename(directory)
    return directory


def prepare(task: DictConfig, console: Console | None = None) -> Path:
    """`prepare_arithmetic` for the section `task` of the recipe `quickstart`."""
    # Saving 0.5 MB needs no progress bar.
    disable_progress_bar()
    return prepare_arithmetic(Path(task.folder).parent, task.digits, task.seed, heads=task.heads, console=console)
