"""Light: the curves of BT.2100 at published points, the EETF, and frames of HDR and wide gamuts as sRGB."""

import numpy
import pytest

from stage1_encode.media.tone_mapping import (
    CHROMATICITIES,
    MAX_CODE,
    LightSource,
    bt709_to_light,
    hlg_to_scene,
    light_to_bt709,
    light_to_pq,
    light_to_srgb,
    map_tones,
    measure_peak,
    pq_to_light,
    render_srgb,
    rgb_to_xyz,
    srgb_to_light,
)

WHITE, GREY, RED, SKIN = (255, 255, 255), (128, 128, 128), (210, 40, 40), (200, 120, 90)
PATCHES = numpy.array([WHITE, GREY, RED, SKIN])


def encode_hlg(light: numpy.ndarray) -> numpy.ndarray:
    """Light (N 3) of BT.2020 shown on a screen of 1000 nits, as an HLG signal: the inverse OOTF, then the OETF."""
    shown = light * 0.203
    scene = shown * ((shown @ rgb_to_xyz("BT.2020")[1]) ** (1 / 1.2 - 1))[:, None]
    high = 0.17883277 * numpy.log(numpy.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return numpy.where(scene <= 1 / 12, numpy.sqrt(3 * scene), high)


def to_gamut(light: numpy.ndarray, gamut: str) -> numpy.ndarray:
    """Light of BT.709 (N 3) in another gamut."""
    return light @ (numpy.linalg.inv(rgb_to_xyz(gamut)) @ rgb_to_xyz("BT.709")).T


def as_frame(signal: numpy.ndarray) -> numpy.ndarray:
    """Signals (N 3) as the code values of a frame with N columns."""
    return numpy.tile((signal * MAX_CODE).round().astype(numpy.uint16), (70, 1, 1))


def test_the_curves_meet_published_points() -> None:
    """BT.2408: reference white is 58 % in PQ and 75 % in HLG; BT.2100: PQ 1 is 10000 nits, HLG 0.5 is 1/12."""
    assert light_to_pq(numpy.array([1.0]))[0] == pytest.approx(0.5807, abs=1e-4)
    assert pq_to_light(numpy.array([1.0]))[0] * 203 == pytest.approx(10000)
    assert hlg_to_scene(numpy.array([0.5, 1.0])) == pytest.approx([1 / 12, 1], abs=1e-6)
    assert 1000 * hlg_to_scene(numpy.array([0.75]))[0] ** 1.2 == pytest.approx(203, abs=1)


@pytest.mark.parametrize(
    ("forth", "back"), [(light_to_pq, pq_to_light), (light_to_srgb, srgb_to_light), (light_to_bt709, bt709_to_light)]
)
def test_the_curves_have_inverses(forth: object, back: object) -> None:
    light = numpy.linspace(0, 1, 1001)
    assert back(forth(light)) == pytest.approx(light, abs=1e-6)


def test_the_matrices_are_those_of_the_standards() -> None:
    assert rgb_to_xyz("BT.709")[1] == pytest.approx([0.2126, 0.7152, 0.0722], abs=1e-4)
    assert rgb_to_xyz("BT.2020")[1] == pytest.approx([0.2627, 0.6780, 0.0593], abs=1e-4)


@pytest.mark.parametrize("peak", [1.2, 1000 / 203, 10000 / 203])
def test_the_eetf_keeps_what_is_dark_and_ends_at_white(peak: float) -> None:
    light = numpy.linspace(0, peak, 5000)
    mapped = map_tones(light, peak)
    assert mapped[-1] == pytest.approx(1, abs=1e-6) and (numpy.diff(mapped) > -1e-9).all()
    assert mapped[light < 0.05] == pytest.approx(light[light < 0.05])
    assert (mapped <= light + 1e-9).all()


@pytest.mark.parametrize("curve", ["HLG", "PQ"])
def test_up_to_reference_white_hdr_keeps_its_colors(curve: str) -> None:
    light = to_gamut(srgb_to_light(PATCHES / 255), "BT.2020")
    codes = as_frame(encode_hlg(light) if curve == "HLG" else light_to_pq(light))
    assert abs(render_srgb(codes, LightSource(curve, "BT.2020")).astype(int) - PATCHES).max() <= 1


@pytest.mark.parametrize("curve", ["HLG", "PQ"])
def test_a_highlight_takes_white_from_what_is_below(curve: str) -> None:
    light = numpy.array([[1000 / 203] * 3, [1.0] * 3, [0.2] * 3])
    codes = as_frame(encode_hlg(light) if curve == "HLG" else light_to_pq(light))
    pixels = render_srgb(codes, LightSource(curve, "BT.2020"))[0]
    assert abs(pixels[0].astype(int) - 255).max() <= 1
    assert abs(pixels[1].astype(int) - 229).max() <= 1  # BT.2390 from 1000 to 203 nits, by hand
    assert abs(pixels[2].astype(int) - 124).max() <= 1  # below the knee


def test_a_spark_does_not_dim_the_frame() -> None:
    light = numpy.full((200, 200, 3), 0.5)
    light[100, 100] = 20
    codes = (light_to_pq(light) * MAX_CODE).astype(numpy.uint16)
    assert measure_peak(codes, LightSource("PQ", "BT.2020")) == 1


@pytest.mark.parametrize("gamut", CHROMATICITIES)
@pytest.mark.parametrize("curve", ["sRGB", "BT.709", "linear"])
def test_a_wide_gamut_becomes_bt709(gamut: str, curve: str) -> None:
    decode = bt709_to_light if curve == "BT.709" else srgb_to_light
    encode = {"sRGB": light_to_srgb, "BT.709": light_to_bt709, "linear": numpy.asarray}[curve]
    codes = as_frame(encode(to_gamut(decode(PATCHES / 255), gamut)))
    assert abs(render_srgb(codes, LightSource(curve, gamut)).astype(int) - PATCHES).max() <= 1


def test_white_may_have_another_code() -> None:
    codes = numpy.full((2, 2, 3), 65283, numpy.uint16)
    assert (render_srgb(codes, LightSource("sRGB", "BT.2020", 65283)) == 255).all()
