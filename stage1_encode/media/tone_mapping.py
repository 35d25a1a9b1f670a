"""Code values of HDR and wide-gamut frames -> 8-bit sRGB of BT.709 primaries.

HDR (HLG, PQ) becomes light as ITU-R BT.2100 says, HLG on a screen of 1000 nits. The curve (EETF) of ITU-R BT.2390 maps
it to a screen whose white is HDR's reference white, 203 nits (ITU-R BT.2408). The peak of the source is that of the
frame, so a frame without brighter pixels keeps its light. Colors outside BT.709 are clipped.

Light is relative to reference white. Shapes: H W pixel height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.floating]
WHITE_NITS, HLG_PEAK_NITS, PQ_PEAK_NITS = 203.0, 1000.0, 10000.0
# x and y of red, green and blue. White is D65 for all, so that grey stays grey; the cinema's P3 has another.
CHROMATICITIES = {
    "BT.709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    "BT.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    "P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
D65 = (0.3127, 0.3290)
PQ_M1, PQ_M2, PQ_C1, PQ_C2, PQ_C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
HLG_A, HLG_B, HLG_C, HLG_GAMMA = 0.17883277, 0.28466892, 0.55991073, 1.2
BT709_A, BT709_B = 1.09929682680944, 0.018053968510807
MAX_CODE = 65535  # of 16-bit code values
BAND_ROWS = 64  # rows converted at once; bounds the memory
PEAK_SAMPLES, PEAK_PERCENTILE = 2**19, 99.99  # the peak's pixels; a few sparks must not dim the frame


def pq_to_light(signal: Array) -> Array:
    """PQ's EOTF (BT.2100 table 4): signal in [0, 1] -> light."""
    power = signal ** (1 / PQ_M2)
    ratio = numpy.maximum(power - PQ_C1, 0) / (PQ_C2 - PQ_C3 * power)
    return PQ_PEAK_NITS / WHITE_NITS * ratio ** (1 / PQ_M1)


def light_to_pq(light: Array) -> Array:
    """The inverse of `pq_to_light`."""
    power = (light * (WHITE_NITS / PQ_PEAK_NITS)) ** PQ_M1
    return ((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power)) ** PQ_M2


def hlg_to_scene(signal: Array) -> Array:
    """HLG's inverse OETF (BT.2100 table 5): signal in [0, 1] -> light of the scene in [0, 1]."""
    return numpy.where(signal <= 0.5, signal**2 / 3, (numpy.exp((signal - HLG_C) / HLG_A) + HLG_B) / 12)


def srgb_to_light(signal: Array) -> Array:
    """sRGB's curve (IEC 61966-2-1)."""
    return numpy.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def light_to_srgb(light: Array) -> Array:
    """The inverse of `srgb_to_light`."""
    return numpy.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def bt709_to_light(signal: Array) -> Array:
    """The inverse of the curve (OETF) of BT.709 and BT.2020."""
    return numpy.where(signal < 4.5 * BT709_B, signal / 4.5, ((signal + BT709_A - 1) / BT709_A) ** (1 / 0.45))


def light_to_bt709(light: Array) -> Array:
    """The inverse of `bt709_to_light`."""
    return numpy.where(light < BT709_B, 4.5 * light, BT709_A * light**0.45 - (BT709_A - 1))


def _keep(light: Array) -> Array:
    return light


DECODERS: dict[str, Callable[[Array], Array]] = {
    "HLG": hlg_to_scene,
    "PQ": pq_to_light,
    "linear": _keep,
    "sRGB": srgb_to_light,
    "BT.709": bt709_to_light,
}
SDR_CURVES = ("sRGB", "BT.709")


@dataclass(frozen=True)
class LightSource:
    """How code values stand for light."""

    curve: str  # key of DECODERS
    gamut: str  # key of CHROMATICITIES
    white_code: int = MAX_CODE  # of a signal of 1

    @property
    def is_hdr(self) -> bool:
        """Whether light may be brighter than white."""
        return self.curve in ("HLG", "PQ")


@cache
def _decode_table(curve: str, white_code: int) -> Array:
    signal = (numpy.arange(MAX_CODE + 1) / white_code).clip(0, 1)
    return DECODERS[curve](signal).astype(numpy.float32)


@cache
def _encode_table(curve: str) -> NDArray[numpy.uint8]:
    # linear steps of 1/65535 are a twentieth of an 8-bit step where sRGB is steepest
    light = numpy.arange(MAX_CODE + 1) / MAX_CODE
    signal = light_to_bt709(light) if curve == "BT.709" else light_to_srgb(light)
    return (signal * 255).round().astype(numpy.uint8)


def rgb_to_xyz(gamut: str) -> Array:
    """The matrix (3 3) from RGB light to CIE XYZ with white at Y = 1 (SMPTE RP 177)."""
    columns = numpy.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES[gamut]]).T
    white = numpy.array([D65[0] / D65[1], 1, (1 - D65[0] - D65[1]) / D65[1]])
    return columns * numpy.linalg.solve(columns, white)


def decode_light(codes: NDArray[numpy.uint16], source: LightSource) -> Array:
    """Code values (H W 3) as displayed light (H W 3)."""
    light = _decode_table(source.curve, source.white_code)[codes]
    if source.curve == "HLG":  # the screen's part (OOTF) depends on the luminance of the scene
        luminance = light @ rgb_to_xyz(source.gamut)[1].astype(numpy.float32)
        light *= (HLG_PEAK_NITS / WHITE_NITS) * luminance[..., None] ** (HLG_GAMMA - 1)
    return light


def map_tones(light: Array, peak: float) -> Array:
    """Light in [0, peak] to [0, 1] by the EETF of BT.2390 section 5.4.1, for peaks above 1 and a black of 0."""
    white_code, peak_code = light_to_pq(numpy.array([1.0, peak]))
    white = white_code / peak_code
    knee = 1.5 * white - 0.5
    code = light_to_pq(light.clip(0, peak)) / peak_code
    t = ((code - knee) / (1 - knee)).clip(0)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * white
    return numpy.where(code < knee, light, pq_to_light(spline * peak_code))


def measure_peak(codes: NDArray[numpy.uint16], source: LightSource) -> float:
    """The brightest light of any color in code values (H W 3), sparks excepted; at least 1."""
    step = 1 + int((codes.shape[0] * codes.shape[1] / PEAK_SAMPLES) ** 0.5)
    brightest = decode_light(codes[::step, ::step], source).max(-1)
    return max(1.0, float(numpy.percentile(brightest, PEAK_PERCENTILE)))


def render_srgb(codes: NDArray[numpy.uint16], source: LightSource) -> NDArray[numpy.uint8]:
    """Code values (H W 3) as 8-bit sRGB (H W 3); SDR is encoded by its own curve again, so that grey stays as it is."""
    to_bt709 = (numpy.linalg.inv(rgb_to_xyz("BT.709")) @ rgb_to_xyz(source.gamut)).T.astype(numpy.float32)
    peak = measure_peak(codes, source) if source.is_hdr else 1.0
    inputs = peak * numpy.linspace(0, 1, 4097)[1:] ** 4  # dense in the dark, as the eye is
    gains = map_tones(inputs, peak) / inputs if peak > 1 else None
    pixels = numpy.empty(codes.shape, numpy.uint8)
    for start in range(0, len(codes), BAND_ROWS):
        light = decode_light(codes[start : start + BAND_ROWS], source)
        if gains is not None:  # one gain for the three colors of a pixel keeps its hue
            light *= numpy.interp(light.max(-1), inputs, gains).astype(numpy.float32)[..., None]
        levels = (light @ to_bt709).clip(0, 1) * MAX_CODE
        pixels[start : start + BAND_ROWS] = _encode_table(source.curve)[levels.round().astype(numpy.uint16)]
    return pixels
