"""Color profiles (ICC) of pictures: conversion to sRGB by LittleCMS."""

import io

import numpy
from PIL import Image, ImageCms

CONVERTED, UNUSABLE = "ICC profile to sRGB", "unusable ICC profile ignored"
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # of Pillow, for a profile's color space
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
SRGB_TOLERANCE = 2  # of 255; profiles of sRGB differ by rounding only, and the nearest other one by five


def convert_profile(image: Image.Image, profile: object) -> tuple[Image.Image, str]:
    """An 8-bit picture in sRGB, and what was done; "" = nothing, because it has no profile or that of sRGB.

    The intent is relative colorimetric with black point compensation. A profile that is broken or belongs to another
    kind of picture is ignored, as browsers do. Transparency is kept.
    """
    lab = ImageCms.createProfile("LAB") if image.mode == "LAB" else None  # no RGB without a conversion
    if not profile and lab is None:
        return image, ""
    try:
        source = ImageCms.ImageCmsProfile(lab or io.BytesIO(profile if isinstance(profile, bytes) else b""))
        colors = _without_alpha(image, MODES.get(source.profile.xcolor_space.strip(), ""))
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            colors.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if _keeps_srgb(transform, colors.mode):
            return image, ""
        converted = transform.apply(colors)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image, UNUSABLE
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted, CONVERTED


def _without_alpha(image: Image.Image, mode: str) -> Image.Image:
    """The colors of a picture in the mode of its profile; ValueError if the profile belongs to another kind."""
    is_grey, is_ink = image.mode in GREY_MODES, image.mode in ("CMYK", "LAB")
    if not mode or (mode == "L" and not is_grey) or ((is_ink or mode in ("CMYK", "LAB")) and image.mode != mode):
        raise ValueError(f"a profile of {mode or 'unknown colors'} in a picture of {image.mode}")
    opaque = image.convert("RGBA") if image.has_transparency_data else image  # a palette's alpha is in its entries
    return opaque.convert("RGB").convert(mode) if opaque.mode == "RGBA" else opaque.convert(mode)


def _keeps_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform changes nothing but the rounding of RGB or grey."""
    if mode not in ("RGB", "L"):
        return False
    steps = numpy.arange(256, dtype=numpy.uint8)
    grid = numpy.stack(numpy.meshgrid(*[steps[::17]] * 3), -1).reshape(64, 64, 3)
    sample = grid if mode == "RGB" else steps[None]
    expected = sample if mode == "RGB" else numpy.stack([sample] * 3, -1)
    changed = numpy.asarray(transform.apply(Image.fromarray(sample)))
    return bool((abs(changed.astype(int) - expected) <= SRGB_TOLERANCE).all())
