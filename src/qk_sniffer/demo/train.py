"""Trains the demo's model, so that the demo shows heads that really learned something.

A demo on random weights would show vectors without structure, and a published checkpoint cannot
be shipped with the package. This module makes the model in between: a Llama-type network small
enough to train on two CPU cores within minutes, and large enough to grow previous-token heads.
The same machine and library versions give the same weights to the last bit.

A quarter of the training rows is no text: it is random tokens, repeated, which reward looking up
what followed an earlier occurrence. Even so the few minutes of training grow no induction head.
The run ends with scores for both kinds of head, on text and random rows that were not trained on,
so that nobody has to take the model for more than it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

DEMO_DIR = Path(__file__).resolve().parent
TRAIN_TEXT = DEMO_DIR / "train.jsonl"
HELD_OUT_TEXT = DEMO_DIR / "text.jsonl"

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 2048
MAX_LENGTH = 2048
SEED = 0
IGNORED_LABEL = -100
THREADS = 2
SCORED_PERIODS = (32, 128)


@dataclass(frozen=True)
class Recipe:
    """How the model is trained; lengths are in tokens and include the leading BOS."""

    steps: int = 1000
    batch_tokens: int = 2048
    row_length: int = 256
    long_every: int = 8
    """Every n-th step uses rows of `MAX_LENGTH` tokens, to train far positions too."""
    repeated_share: float = 0.25
    min_period: int = 8
    peak_lr: float = 3e-3
    final_lr_share: float = 0.05
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    report_every: int = 100


def read_documents(path: Path) -> list[str]:
    """Return the texts of a JSON Lines file whose rows have a "text" field, in file order."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts BOS in front of every text and pads right."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B:1",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a freshly initialised model for the tokenizer's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass
class RowSampler:
    """Draws training rows: windows of the packed text, and repeated random tokens.

    `stream` is the packed text, int64 [tokens]: BOS, a document, EOS, the next BOS, and so on.
    Special tokens have the ids below `first_plain_id`.
    """

    stream: Tensor
    bos_id: int
    first_plain_id: int
    recipe: Recipe
    generator: torch.Generator

    def text_row(self, length: int) -> tuple[Tensor, Tensor]:
        """Return input ids and labels, int64 [length] each: BOS and a window of the stream."""
        last_start = len(self.stream) - (length - 1)
        start = int(torch.randint(last_start + 1, (1,), generator=self.generator))
        window = self.stream[start : start + length - 1]
        row = torch.cat([torch.tensor([self.bos_id]), window])
        return row, row

    def repeated_row(self, length: int) -> tuple[Tensor, Tensor]:
        """Return input ids and labels, int64 [length] each: BOS and a repeated random sequence.

        The first occurrence cannot be predicted, so that only the repetitions carry labels.
        """
        longest = (length - 1) // 2
        draw = torch.randint(self.recipe.min_period, longest + 1, (1,), generator=self.generator)
        period = int(draw)
        unit = torch.randint(self.first_plain_id, VOCAB_SIZE, (period,), generator=self.generator)
        tiled = unit.repeat(math.ceil((length - 1) / period))[: length - 1]
        row = torch.cat([torch.tensor([self.bos_id]), tiled])
        labels = row.clone()
        labels[: 1 + period] = IGNORED_LABEL
        return row, labels

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield input ids and labels, int64 [rows, length] each, one pair per step."""
        recipe = self.recipe
        for step in range(recipe.steps):
            is_long = step % recipe.long_every == recipe.long_every - 1
            length = MAX_LENGTH if is_long else recipe.row_length
            rows = []
            for _ in range(recipe.batch_tokens // length):
                drawn = float(torch.rand(1, generator=self.generator))
                repeated = drawn < recipe.repeated_share
                rows.append(self.repeated_row(length) if repeated else self.text_row(length))
            yield torch.stack([ids for ids, _ in rows]), torch.stack([kept for _, kept in rows])


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return int64 [tokens]: every text's ids, each with BOS in front and EOS behind."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves the norms' scales alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas)


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Return the step's share of the peak learning rate: linear warm-up, then a cosine."""
    warmup = max(1, round(recipe.steps * recipe.warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_lr_share + (1 - recipe.final_lr_share) * cosine


def train(
    model: LlamaForCausalLM, sampler: RowSampler, held_out: Sequence[Tensor], recipe: Recipe
) -> None:
    """Train the model in place; `held_out` holds int64 [tokens] per document, for the reports."""
    optimizer = build_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, recipe)
    )
    began = time.monotonic()
    losses: list[float] = []
    model.train()
    for step, (ids, labels) in enumerate(sampler.batches(), start=1):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % recipe.report_every == 0 or step == recipe.steps:
            logger.info(
                "step %d/%d: training loss %.3f, held-out loss %.3f nats/token, %.0f s",
                step,
                recipe.steps,
                sum(losses) / len(losses),
                held_out_loss(model, held_out),
                time.monotonic() - began,
            )
            losses.clear()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, documents: Sequence[Tensor]) -> float:
    """Return the mean next-token loss, in nats per token, over documents of int64 [tokens]."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for ids in documents:
        predicted = len(ids) - 1
        total += model(input_ids=ids[None], labels=ids[None]).loss.item() * predicted
        count += predicted
    model.train(was_training)
    return total / count


@torch.no_grad()
def attention_to_offset(model: LlamaForCausalLM, rows: Tensor, offset: int, first_query: int) -> Tensor:
    """Return how much each head attends `offset` tokens back: float32 [layers, query heads].

    `rows` is int64 [rows, tokens]; the mean runs over rows and over queries from `first_query` on.
    """
    # Only the eager implementation returns attention weights.
    fast = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model.eval()
    attentions = model(input_ids=rows, output_attentions=True).attentions
    model.set_attn_implementation(fast)
    per_layer = []
    for weights in attentions:
        diagonal = weights.diagonal(offset=-offset, dim1=-2, dim2=-1)
        per_layer.append(diagonal[..., first_query - offset :].mean(dim=(0, 2)))
    return torch.stack(per_layer)


def previous_token_scores(
    model: LlamaForCausalLM, documents: Sequence[Tensor], length: int = 256
) -> Tensor:
    """Return each head's mean attention to the token before, on text: [layers, query heads].

    Queries start at position 2: the token before position 1 is BOS, which many heads use as a
    place to attend to when they have nothing to do.
    """
    rows = torch.stack([ids[:length] for ids in documents if len(ids) >= length])
    return attention_to_offset(model, rows, offset=1, first_query=2)


def induction_scores(
    model: LlamaForCausalLM, bos_id: int, first_plain_id: int, period: int, rows: int = 16
) -> Tensor:
    """Return each head's induction score, float32 [layers, query heads]: at most 1, 0 for none.

    Rows of BOS and `period` random tokens, repeated once, give the mean attention from the second
    occurrence's tokens to the token after their first occurrence; for the last token this is the
    second occurrence's own first token, which follows it as well. Special tokens have the ids
    below `first_plain_id` and are not drawn.

    The score is how much more this is than at the same distance in rows that repeat nothing:
    a head may look that far back whatever stands there, which is not induction.
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    halves = torch.randint(first_plain_id, VOCAB_SIZE, (2, rows, period), generator=generator)
    bos = torch.full((rows, 1), bos_id)
    repeated = torch.cat([bos, halves[0], halves[0]], dim=1)
    unrelated = torch.cat([bos, halves[1], halves[0]], dim=1)
    offset, first_query = period - 1, 1 + period
    return attention_to_offset(model, repeated, offset, first_query) - attention_to_offset(
        model, unrelated, offset, first_query
    )


def log_best_head(name: str, scores: Tensor) -> None:
    """Log the strongest head of float [layers, query heads] scores."""
    best = int(scores.argmax())
    layer, head = divmod(best, scores.shape[1])
    logger.info("%s score %.3f: layer %d, query head %d", name, scores.max(), layer, head)
    for index, row in enumerate(scores):
        logger.info("  layer %d: %s", index, " ".join(f"{score:.2f}" for score in row))


def make_reproducible() -> None:
    """Fix what would let two trainings on the same machine differ."""
    torch.manual_seed(SEED)
    # The order in which threads' partial sums are added depends on how many threads there are.
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the model and tokenizer to the folder `output`, as `from_pretrained` reads them."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # It is written for its owner alone, which would shut other users out of an installed package.
    (output / "model.safetensors").chmod(0o644)
    # It only repeats the token ids that config.json has.
    (output / "generation_config.json").unlink(missing_ok=True)


def make_model(output: Path, recipe: Recipe) -> None:
    """Train tokenizer and model from the demo's texts, report on them, and write both."""
    make_reproducible()
    texts = read_documents(TRAIN_TEXT)
    tokenizer = train_tokenizer(texts)
    model = build_model(tokenizer)
    stream = pack(texts, tokenizer)
    held_out = [
        torch.tensor(tokenizer(text, truncation=True)["input_ids"])
        for text in read_documents(HELD_OUT_TEXT)
    ]
    logger.info(
        "%d parameters, %d training tokens, %d held-out tokens",
        model.num_parameters(),
        len(stream),
        sum(map(len, held_out)),
    )
    bos_id, first_plain_id = tokenizer.bos_token_id, len(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(SEED)
    sampler = RowSampler(stream, bos_id, first_plain_id, recipe, generator)
    train(model, sampler, held_out, recipe)
    log_best_head("previous-token", previous_token_scores(model, held_out))
    for period in SCORED_PERIODS:
        scores = induction_scores(model, bos_id, first_plain_id, period)
        log_best_head(f"induction, period {period},", scores)
    save(model, tokenizer, output)
    logger.info("wrote %s", output)


def main() -> None:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(prog="python -m qk_sniffer.demo.train", description=__doc__)
    parser.add_argument("--output", type=Path, default=DEMO_DIR / "model", metavar="DIR")
    parser.add_argument("--steps", type=int, default=Recipe.steps, metavar="N")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    make_model(options.output, Recipe(steps=options.steps))


if __name__ == "__main__":
    main()
