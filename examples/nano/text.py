"""The nano tokenizer and text encoder, trained on captions alone: every token learns the meaning of its clause.

Shapes: B prompts, L = 32 rows, D = 64 width. The denoiser later sees these embeddings frozen.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from examples.nano import captions
from examples.nano.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, draw_scenes

ROWS, WIDTH = 32, 64
CLASSES = (4, len(COLOURS) + 1 + len(BACKGROUNDS), len(SHAPES) + 1, len(MOTIONS) + 1)  # role, colour, shape, motion


def vocabulary() -> list[str]:
    """Return all words of the grammar and of the negative prompt, sorted."""
    texts = [*captions.PHRASES, *captions.SOMETHING, *captions.ENTER_WORDS, *captions.ARTICLES, *captions.GROUNDS]
    texts += [*COLOURS, *SHAPES, *BACKGROUNDS, captions.NEGATIVE_PROMPT, ", and while"]
    return sorted({word for text in texts for word in text.replace(",", " , ").replace("{}", " ").split()})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer: one token per word, bytes for other text, `</s>` at the end, pad id 0 (T5's numbering)."""
    specials = ["<pad>", "</s>", "<unk>"]
    pieces = specials + [f"<0x{byte:02X}>" for byte in range(256)] + vocabulary()
    ids = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.decoder = decoders.ByteFallback()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_encoder(tokens: int) -> UMT5EncoderModel:
    """Return a small UMT5 encoder with fresh weights."""
    config = UMT5Config(
        vocab_size=tokens, d_model=WIDTH, d_kv=16, d_ff=128, num_layers=3, num_heads=4, dropout_rate=0.0,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        relative_attention_max_distance=64,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B L); the last row is always empty, so that it can represent all zero rows up to 512."""
    batch = tokenizer(prompts, padding="max_length", max_length=ROWS, return_tensors="pt")
    assert batch.input_ids.shape[1] == ROWS and not batch.attention_mask[:, -1].any(), "a caption of over 31 tokens"
    return batch.input_ids, batch.attention_mask


@torch.no_grad()
def embed(encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Tensor:
    """Return embeddings (B L D), zero past each prompt's end."""
    ids, mask = (part.to(encoder.device) for part in tokenize(tokenizer, prompts))
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


def labels(prompt: str) -> list[tuple[int, int, int, int]]:
    """Return the role, colour, shape and motion class of every word of a prompt's clause."""
    asked, clause, ground = captions.parse(prompt), 0, None
    rows = []
    words = prompt.replace(",", " ,").split()
    for i, word in enumerate(words):
        if word in ("on", "over"):
            ground = BACKGROUNDS.index(words[i + 2])
        clause += word in (",", "and", "while")
        if ground is not None:
            rows.append((3, len(COLOURS) + 1 + ground, len(SHAPES), len(MOTIONS)))
            continue
        a = asked[clause]
        colour, shape = (len(COLOURS), len(SHAPES)) if a.colour is None or a.shape is None else (a.colour, a.shape)
        motion = len(MOTIONS) if a.enters else len(MOTIONS) - 1 if a.motion is None else a.motion
        rows.append((2 if a.enters else clause, colour, shape, motion))
    return rows


def label_batch(prompts: list[str]) -> Tensor:
    """Return classes (B L 4), -100 at positions without a word."""
    table = torch.full((len(prompts), ROWS, len(CLASSES)), -100)
    for i, prompt in enumerate(prompts):
        rows = labels(prompt)
        table[i, : len(rows)] = torch.tensor(rows)
    return table


def train_text(folder: Path, *, seed: int, iterations: int, batch: int = 128) -> float:
    """Train and save `tokenizer/` and `text_encoder/`; returns the share of right answers in the last batches."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, head = make_encoder(len(tokenizer)), nn.Linear(WIDTH, sum(CLASSES))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, iterations)
    right = 0.0
    for i in range(iterations):
        scenes = draw_scenes(seed + 17, torch.arange(i * batch, (i + 1) * batch), held=False)
        prompts = captions.captions(scenes)
        ids, mask = tokenize(tokenizer, prompts)
        target = label_batch(prompts)
        logits = head(encoder(input_ids=ids, attention_mask=mask).last_hidden_state).split(CLASSES, dim=-1)
        losses = [nn.functional.cross_entropy(p.flatten(0, 1), target[..., k].flatten()) for k, p in enumerate(logits)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        decay.step()
        is_word = target[..., 0] >= 0
        hits = torch.stack([p.argmax(-1) == target[..., k] for k, p in enumerate(logits)]).all(dim=0)
        right = 0.95 * right + 0.05 * hits[is_word].float().mean().item() if i else 0.0
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")
    return right
