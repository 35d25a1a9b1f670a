"""A two-sample test: how often a small classifier, trained on half of the videos, tells two sets apart in the other.

0.5 = it cannot, 1 = always. A distance compares what its map happens to see; a classifier looks for what differs
(classifier two-sample test, Lopez-Paz & Oquab 2017, arXiv 1610.06545).
Shapes: N videos per set, B of a batch, C channels, T frames, H W size; h w tokens of D = C p^2 values, patches p x p.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

NORMAL_95 = 1.96  # 97.5 % point of the normal distribution
SMALLEST_SHARE = 1e-6  # of the mean variance: directions with less are left small, because they are rounding errors
WHITENING_TOKENS = 2**18  # from which covariances are estimated
EPOCHS, MIN_STEPS = 30, 60  # passes over the training half, enough for every set tried; but at least so many steps
WARM_UP, DECAY_SHARE = 10, 0.7  # steps of rising rate; share of the steps in which it falls to zero
MIN_VIDEOS = 8  # per set
FLOAT_BYTES, CACHE_BYTES = 4, 2**32  # of features that are computed once instead of for every batch
STABLE_SIGN = 1e-4  # added to variances, whose root has no slope at 0


@dataclass(frozen=True)
class ClassifierSettings:
    """Size and training of the classifier; the defaults suit thousands of videos on a GPU."""

    width: int = 96
    max_steps: int = 700
    batch_size: int = 256  # half of it from each set
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    patch: int = 2  # side of a token: 2 suits latents, 8 pixels
    whiten: bool = True  # False = channels scaled only, which is weaker: it does not see small noise


SMALL_CLASSIFIER = ClassifierSettings(width=32, batch_size=64)  # for hundreds of videos on a CPU
PIXEL_PATCH = 8
SMALL_PIXELS = ClassifierSettings(width=8, batch_size=32, patch=PIXEL_PATCH)  # for tens of videos on a CPU
SMALL_STRIDE = 4  # of the frames there: one for each latent frame, in a quarter of the time


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out videos that the classifier assigns to the right set, with its 95 % interval."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]  # one per seed of the classifier
    count: int  # N


class TokenWhitening(nn.Module):
    """Rotates and scales tokens, and their changes over time, so that every direction has variance 1.

    Errors of samplers are small noise in directions in which clips hardly vary; without whitening it vanishes beside
    the picture. The maps are estimated from `videos` (B C T H W), which must not hold videos of the test.
    """

    def __init__(self, videos: Tensor, settings: ClassifierSettings) -> None:
        super().__init__()
        self.settings = settings
        self.weights, self.means = nn.ParameterList(), nn.ParameterList()
        for part in self._tokens(videos):
            rows = rearrange(part, "b d t h w -> (b t h w) d")
            values, vectors = torch.linalg.eigh(torch.cov(rows.T))
            if not settings.whiten:
                values, vectors = rows.var(dim=0), torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
            floor = (values.mean() * SMALLEST_SHARE).clamp(min=torch.finfo(torch.float32).tiny)
            self.weights.append(nn.Parameter(vectors / values.maximum(floor).sqrt(), requires_grad=False))
            self.means.append(nn.Parameter(rows.mean(0), requires_grad=False))

    def _tokens(self, videos: Tensor) -> list[Tensor]:
        """Tokens (B D T' h w) in float64: of TF32, which a GPU may use for float32, small directions would vanish."""
        if not self.settings.whiten:
            return [videos.double()]
        patch = self.settings.patch
        height, width = (size // patch * patch for size in videos.shape[3:])
        split = "b c t (h p) (w q) -> b (c p q) t h w"
        tokens = rearrange(videos[..., :height, :width].double(), split, p=patch, q=patch)
        return [tokens[:, :, 1:], tokens.diff(dim=2)]  # the first frame is given: it shows in the changes only

    def forward(self, videos: Tensor) -> Tensor:
        """Features (B D' T' h w) float32 of videos (B C T H W)."""
        parts = []
        for tokens, weight, mean in zip(self._tokens(videos), self.weights, self.means, strict=True):
            centred = rearrange(tokens, "b d t h w -> b t h w d") - mean
            parts.append(rearrange(centred @ weight, "b t h w d -> b d t h w").float())
        return torch.cat(parts, dim=1)


class VideoClassifier(nn.Module):
    """Three 3-D convolutions; mean and deviation over all positions after each of them; a linear layer to a logit."""

    def __init__(self, channels: int, settings: ClassifierSettings, generator: torch.Generator) -> None:
        super().__init__()
        width = settings.width
        # Whitened tokens are patches already: the first layer only chooses directions.
        kernels, sizes = (1 if settings.whiten else 3, 3, 3), (channels, width, width)
        self.convolutions = nn.ModuleList(
            nn.utils.skip_init(nn.Conv3d, size, width, kernel, padding=kernel // 2)
            for size, kernel in zip(sizes, kernels, strict=True)
        )
        pooled = 2 * len(kernels) * width
        # Without it the threshold is learned last: scores that separate the sets lie on one side of 0 for long.
        self.norm = nn.BatchNorm1d(pooled, affine=False)
        self.head = nn.utils.skip_init(nn.Linear, pooled, 1)
        for name, weight in self.convolutions.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()), generator=generator)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B), positive for the first set, of features (B D' T' h w)."""
        pooled = []
        for convolution in self.convolutions:
            response = convolution(features)
            features, positions = functional.gelu(response), (2, 3, 4)
            # Deviations of the responses themselves, not of what gelu leaves: a direction's variance is a feature.
            variance = response.float().var(dim=positions, correction=0)
            pooled += [features.float().mean(dim=positions), (variance + STABLE_SIGN).sqrt()]
        logits: Tensor = self.head(self.norm(torch.cat(pooled, dim=1)))
        return logits[:, 0]


def two_sample_accuracy(
    one: Tensor,
    other: Tensor,
    *,
    seeds: Sequence[int],
    device: torch.device | str,
    settings: ClassifierSettings | None = None,
) -> Accuracy:
    """Accuracy of a classifier that tells `one` from `other` (N C T H W, any dtype and device), cross-fitted.

    Row n of both sets belongs to condition n. Every video is tested once per seed, by a network trained on the other
    half of the conditions. Without `settings` they suit the device. Equal on every call with the same seeds and device.
    """
    if one.shape != other.shape or one.dim() != 5 or len(one) < MIN_VIDEOS or one.shape[2] < 2:
        shapes = f"{tuple(one.shape)} and {tuple(other.shape)}"
        raise ValueError(f"one, other: shapes {shapes}; give two equal ones (N C T H W), N at least 8, T at least 2")
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        raise ValueError("one, other: hold values that are not finite; leave such videos out")
    device, settings = torch.device(device), settings or default_settings(device)
    first, second = torch.arange(len(one)).tensor_split(2)
    folds, right = ((second, first), (first, second)), []
    # What is deterministic costs little here, and a test that gives two answers is none.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        for seed in seeds:
            tested = [_test_fold((one, other), fold, 2 * seed + i, device, settings) for i, fold in enumerate(folds)]
            right.append(torch.cat(tested))
    return summarize_accuracy(torch.stack(right))


def summarize_accuracy(right: Tensor) -> Accuracy:
    """Mean and 95 % interval of shares of right answers (S N), by S seeds of the classifier and N conditions.

    What one half's chance differences predict in the other is what the other's predict in the first: of sets that do
    not differ, the two halves' shares correlate by 0.5. So they count as one half of the conditions, which is careful.
    """
    values, count = right.mean(dim=1).tolist(), right.shape[1]
    variance = float(right.mean(dim=0).var()) / (count / 2)
    if len(values) > 1:
        variance += statistics.variance(values) / len(values)
    mean, half = statistics.fmean(values), NORMAL_95 * math.sqrt(variance)
    return Accuracy(mean, max(0.0, mean - half), min(1.0, mean + half), tuple(values), count)


def default_settings(device: torch.device | str) -> ClassifierSettings:
    """The settings for latents that suit a device."""
    return SMALL_CLASSIFIER if torch.device(device).type == "cpu" else ClassifierSettings()


def tell_pixels_apart(one: Tensor, other: Tensor, seed: int, *, device: str) -> tuple[float, float, float]:
    """Accuracy of the test between decoded videos (N 3 F X Y) uint8, and the bounds of its interval.

    A CPU looks at every fourth frame, with a smaller classifier: half a minute for 32 videos becomes a few seconds.
    """
    settings = ClassifierSettings(patch=PIXEL_PATCH)
    if torch.device(device).type == "cpu":
        one, other, settings = one[:, :, ::SMALL_STRIDE], other[:, :, ::SMALL_STRIDE], SMALL_PIXELS
    found = two_sample_accuracy(one, other, seeds=(seed,), device=device, settings=settings)
    return found.mean, found.low, found.high


@dataclass(frozen=True)
class FeatureSource:
    """Two sets of videos, or of their features if those fit into memory, and the map that is still to be applied."""

    sets: tuple[Tensor, Tensor]  # (N C T H W), or features (N D' T' h w)
    whitening: TokenWhitening | None  # None = the sets hold features
    device: torch.device

    def take(self, index: int, rows: Tensor) -> Tensor:
        """Features (B D' T' h w) of these rows of one of the sets."""
        videos = _take(self.sets[index], rows, self.device)
        return videos if self.whitening is None else self.whitening(videos)


def open_source(
    sets: tuple[Tensor, Tensor], train: Tensor, device: torch.device, settings: ClassifierSettings
) -> FeatureSource:
    """Features of both sets, whitened by the first of the training rows, as many as the estimate needs."""
    area = settings.patch**2 if settings.whiten else 1
    few = train[: max(2, WHITENING_TOKENS * area // (2 * math.prod(sets[0].shape[2:])))]
    whitening = TokenWhitening(torch.cat([_take(videos, few, device) for videos in sets]), settings).to(device)
    if 2 * FLOAT_BYTES * len(sets) * sets[0].numel() > CACHE_BYTES:
        return FeatureSource(sets, whitening, device)
    parts = [[whitening(part.to(device)) for part in videos.split(settings.batch_size)] for videos in sets]
    return FeatureSource((torch.cat(parts[0]), torch.cat(parts[1])), None, device)


def _test_fold(
    sets: tuple[Tensor, Tensor],
    fold: tuple[Tensor, Tensor],
    seed: int,
    device: torch.device,
    settings: ClassifierSettings,
) -> Tensor:
    """Train on the rows fold[0]; return for the rows fold[1] the share (N/2) of the two videos that are told right."""
    train, test = fold
    source = open_source(sets, train, device, settings)
    classifier = train_classifier(source, train, torch.Generator().manual_seed(seed), settings)
    right = torch.zeros(len(test))
    with torch.no_grad():
        for rows, part in zip(test.split(settings.batch_size), right.split(settings.batch_size), strict=True):
            for index, sign in enumerate((1, -1)):
                logits = sign * _logits(classifier, source.take(index, rows)).cpu()
                part += 0.5 * (logits > 0) + 0.25 * (logits == 0)  # a logit of 0 decides nothing
    return right


def train_classifier(
    source: FeatureSource, rows: Tensor, generator: torch.Generator, settings: ClassifierSettings
) -> VideoClassifier:
    """A classifier trained on these rows of both sets by AdamW and logistic loss, its rate falling to zero."""
    pairs = min(settings.batch_size // 2, len(rows))
    steps = min(settings.max_steps, max(MIN_STEPS, EPOCHS * len(rows) // pairs))
    classifier = VideoClassifier(source.take(0, rows[:1]).shape[1], settings, generator).to(source.device)
    rate = settings.learning_rate
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=settings.weight_decay)
    for step, chosen in zip(range(steps), _draw_rows(rows, pairs, generator), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY_SHARE * steps))
        # Both videos of a condition are in the batch, so that conditions do not tell the sets apart by chance.
        logits = _logits(classifier, torch.cat([source.take(index, chosen) for index in (0, 1)]))
        loss = functional.softplus(torch.cat([-logits[:pairs], logits[pairs:]])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return classifier.eval()


def _logits(classifier: VideoClassifier, features: Tensor) -> Tensor:
    """Logits (B) float32 of features; a GPU computes the convolutions in bfloat16."""
    with torch.autocast(features.device.type, torch.bfloat16, enabled=features.device.type == "cuda"):
        logits: Tensor = classifier(features)
    return logits.float()


def _draw_rows(rows: Tensor, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Parts of `count` rows of ever new permutations, without end."""
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator)][: len(rows) // count * count].split(count)


def _take(videos: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """These rows on the classifier's device."""
    return videos[rows.to(videos.device)].to(device)
