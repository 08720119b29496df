"""Pictures of every depth, layout and state: the right RGB picture, or one line."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from minomni.errors import UserError
from minomni.inputs.image import MAX_IMAGE_PIXELS, load_image

RAMP = np.linspace(0, 1, 35).reshape(5, 7)  # [height, width], black to white


def bytes_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(bits: int, color: int, levels: np.ndarray) -> bytes:
    """A PNG of any depth. levels [h, w, bytes per pixel], as they are stored."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, color, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(
    bits: int, sample_format: int, photometric: int, levels: np.ndarray, order: str = "<"
) -> bytes:
    """An uncompressed gray TIFF of any number type and byte order."""
    content = levels.tobytes()
    tags = [
        (256, levels.shape[1]),
        (257, levels.shape[0]),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 150),
        (277, 1),
        (278, levels.shape[0]),
        (279, len(content)),
        (339, sample_format),
    ]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    for tag, value in tags:
        is_long = tag in (273, 279)
        head += struct.pack(f"{order}HHI", tag, 4 if is_long else 3, 1)
        head += struct.pack(f"{order}I", value) if is_long else struct.pack(f"{order}HH", value, 0)
    return (head + bytes(4)).ljust(150, b"\0") + content


def gray(image) -> np.ndarray:
    assert image.mode == "RGB"
    levels = np.asarray(image).astype(int)
    assert (levels == levels[..., :1]).all()
    return levels[..., 0]


def is_ramp(image, levels=RAMP) -> bool:
    return gray(image).shape == levels.shape and abs(gray(image) - levels * 255).max() <= 1


def refusal(source, is_right) -> str | None:
    """The message of the refusal; None where the image was read, which has to be right."""
    try:
        image = load_image(source)
    except UserError as error:
        return str(error)
    assert is_right(image)
    return None


def refused(source, *says):
    with pytest.raises(UserError) as error:
        load_image(source)
    message = str(error.value)
    assert all(part in message for part in says), message
    assert message.isprintable()
    assert len(message) <= 500


# ----------------------------------------------------------------------------------------------
# deeper than 8 bits
@pytest.mark.parametrize("order", "<>")
@pytest.mark.reads("image", "images of 16 bits or of floats", "scaled to 8 bits")
def test_gray_tiffs_that_tell_their_scale(order):
    deep = (RAMP * 65_535).astype(f"{order}u2")
    floats = RAMP.astype(f"{order}f4")
    assert is_ramp(load_image(tiff(16, 1, 1, deep, order)))
    assert is_ramp(load_image(tiff(32, 3, 1, floats, order)))
    assert is_ramp(load_image(tiff(32, 3, 0, floats, order)), RAMP[::-1, ::-1])  # white is 0
    if order == "<":  # PIL opens the other order not
        assert is_ramp(load_image(tiff(16, 1, 0, deep, order)), RAMP[::-1, ::-1])


def test_twelve_bits():
    levels = (np.linspace(0, 4_095, 40).astype(int)).reshape(4, 10)
    packed = bytearray()
    for a, b in levels.reshape(-1, 2):
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    content = tiff(12, 1, 1, np.frombuffer(bytes(packed), np.uint8).reshape(4, 15))
    content = content.replace(
        struct.pack("<HHIHH", 256, 3, 1, 15, 0), struct.pack("<HHIHH", 256, 3, 1, 10, 0)
    )
    assert is_ramp(load_image(content), levels / 4_095)


@pytest.mark.parametrize(
    ("kind", "sample_format", "top"),
    [
        ("<f4", 3, 255),
        ("<f4", 3, 65_535),
        ("<f4", 3, 1.5),
        ("<i4", 2, 255),
        ("<i4", 2, 65_535),
        ("<i4", 2, 2**31 - 1),
        ("<u4", 1, 65_535),
        ("<i2", 2, 32_767),
    ],
)
@pytest.mark.reads("image", "images of 32 bits or of signed integers", "refused")
def test_tiffs_of_unknown_scale(kind, sample_format, top):
    refused(
        tiff(8 * np.dtype(kind).itemsize, sample_format, 1, (RAMP * top).astype(kind)), "expected"
    )


def test_floats_that_are_no_levels():
    for wrong in (RAMP - 0.5, RAMP * np.nan, np.where(RAMP > 0.5, np.inf, RAMP)):
        refused(Image.fromarray(wrong.astype(np.float32)), "expected 0 to 1")
        refused(wrong, "expected 0 to 1")


def test_sixteen_bits_of_several_channels():
    levels = (RAMP * 65_535).astype(">u2")
    for color, channels in ((0, 1), (2, 3)):
        stored = np.repeat(levels[..., None], channels, 2).astype(">u2")
        assert is_ramp(load_image(png(16, color, stored)))
    for color, channels in ((4, 2), (6, 4)):
        stored = np.repeat(levels[..., None], channels, 2).astype(">u2")
        stored[..., -1] = 65_535  # opaque
        assert is_ramp(load_image(png(16, color, stored)))


def test_deep_pgm():
    for top in (1_023, 65_535):
        content = b"P5 7 5 %d\n" % top + (RAMP * top).round().astype(">u2").tobytes()
        assert is_ramp(load_image(content))


# ----------------------------------------------------------------------------------------------
# arrays
COLORS = np.random.RandomState(3).randint(0, 256, (6, 9, 3), np.uint8)


@pytest.mark.parametrize(
    "array",
    [
        COLORS,
        COLORS.transpose(2, 0, 1),
        COLORS / 255,
        (COLORS / 255).astype(np.float32).transpose(2, 0, 1),
        COLORS.astype(np.uint16) * 257,
        COLORS[::-1][::-1],
        np.asfortranarray(COLORS),
    ],
)
def test_colors_in_arrays(array):
    assert np.array_equal(np.asarray(load_image(array)), COLORS)
    if array.dtype != np.uint16:
        assert np.array_equal(np.asarray(load_image(torch.from_numpy(array.copy()))), COLORS)
    fixed = array.copy()
    fixed.setflags(write=False)
    assert np.array_equal(np.asarray(load_image(fixed)), COLORS)


@pytest.mark.parametrize(
    "array",
    [
        RAMP,
        RAMP[..., None],
        RAMP[None],
        np.stack([RAMP] * 3),
        np.dstack([RAMP] * 3 + [RAMP * 0 + 1]),
    ],
)
def test_gray_arrays(array):
    for kind in ("f4", "f8", "f2"):
        assert is_ramp(load_image(array.astype(kind)))
    assert is_ramp(load_image(np.round(array * 255).astype(np.uint8)))
    assert is_ramp(load_image(torch.from_numpy(array).float().requires_grad_()))
    assert abs(gray(load_image(torch.from_numpy(array).bfloat16())) - RAMP * 255).max() <= 2


@pytest.mark.parametrize("top", [1, 255, 1_023, 4_095])
def test_sixteen_bits_that_were_not_scaled(top):
    levels = (RAMP * top).round().astype(np.uint16)
    for array in (levels, levels.astype(">u2"), np.stack([levels] * 3), torch.from_numpy(levels)):
        refused(array, f"uint16 levels that reach {top} at most", "floats from 0 to 1")
    assert not gray(load_image(levels * 0)).any()
    assert gray(load_image(np.full((4, 6), 4_096, np.uint16))).max() == 15
    assert (
        gray(load_image(png(16, 0, levels[..., None].astype(">u2")))).max() == top // 257
    )  # files tell their scale


def test_sixteen_bits_in_memory_follow_the_rule_of_arrays():
    levels = (RAMP * 255).round().astype(np.uint16)
    refused(Image.fromarray(levels), "uint16 levels that reach 255 at most")
    assert is_ramp(load_image(Image.fromarray((RAMP * 65_535).astype(np.uint16))))
    with Image.open(io.BytesIO(png(16, 0, levels[..., None].astype(">u2")))) as dark:
        assert gray(load_image(dark)).max() == 0  # a file's format tells the scale


def test_arrays_that_are_no_pictures():
    for kind in ("int64", "int32", "int16", "uint32", "bool"):
        refused((RAMP * 255).astype(kind), kind, "expected uint8")
    refused(RAMP * 255, "floats from 0 to 255")
    refused(COLORS - 128.0, "expected 0 to 1")
    refused(COLORS + 1j, "expected numbers")
    refused(np.array([["a", "b"]]), "expected numbers")
    for shape in ((5,), (2, 5, 5), (5, 5, 2), (1, 3, 5, 5), ()):
        refused(np.zeros(shape, np.uint8), "[h, w, 3]")
    refused(np.zeros((0, 5, 3), np.uint8), "5x0 pixels")
    refused(torch.zeros(5, 5, 3, device="meta"), "cannot be read")


@pytest.mark.reads(
    "image", "images of more than 120 million pixels", "refused before they are decoded"
)
def test_sizes_are_bounded_before_pixels_are_made():
    refused(
        np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (30_000, 30_000, 3)),
        "30000x30000 pixels",
        str(MAX_IMAGE_PIXELS),
    )
    refused(torch.zeros(1, 1, 3).expand(10**6, 10**6, 3), "pixels; expected at most")
    for side in (11_000, 13_000, 60_000, 2**31 - 1):
        small = png(1, 0, np.zeros((1, 1, 1), np.uint8))
        large = small.replace(struct.pack(">II", 1, 1), struct.pack(">II", side, side))
        checksum = struct.pack(">I", zlib.crc32(large[12:29]))  # of the header
        refused(large[:29] + checksum + large[33:], " pixels")


# ----------------------------------------------------------------------------------------------
# states of PIL images
def test_pil_images_that_are_broken(tmp_path):
    whole = bytes_of(
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8))
    )
    path = tmp_path / "half.png"
    path.write_bytes(whole[: len(whole) // 2])
    refused(Image.open(path), "the image given: not a readable image")
    refused(Image.open(io.BytesIO(whole[:-900])), "not a readable image")
    with Image.open(io.BytesIO(whole)) as closed:
        pass
    message = refusal(closed, lambda image: image.size == (64, 64))
    assert message is None or "not a readable image" in message
    lazy = Image.open(io.BytesIO(whole))
    assert load_image(lazy).size == load_image(lazy).size == (64, 64)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_modes_of_pil_images(mode):
    for level in (0, 255):
        image = Image.new(
            "RGBA" if "a" in mode or "A" in mode else "RGB", (3, 2), (level, level, level)
        )
        image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
        assert abs(gray(load_image(image)) - level).max() <= 1


def test_modes_that_have_no_rgb():
    message = refusal(Image.new("LAB", (2, 2)), lambda image: image.mode == "RGB")
    assert message is None or "not a readable image" in message


@pytest.mark.parametrize(
    ("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_moving_pictures_show_the_first(kind, options):
    frames = [Image.new("RGB", (6, 4), color) for color in ("lime", "red", "blue")]
    content = bytes_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert load_image(content).getpixel((3, 2)) == (0, 255, 0)


# ----------------------------------------------------------------------------------------------
# EXIF
def exif(orientation, more: bytes = b"", count: int = 1) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, count) + entry + more + bytes(4)


HALVES = np.zeros((16, 32, 3), np.uint8)
HALVES[:8, :, 0] = 255  # red above ...
HALVES[8:, :, 2] = 255  # ... blue
HALVES[:, 16:, 1] = 255  # green added on the right


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
        (0, lambda a: a),
        (9, lambda a: a),
        (65_535, lambda a: a),
    ],
)
@pytest.mark.reads("image", "images with EXIF", "upright, as Pillow shows them")
def test_every_orientation(orientation, turned):
    far, endless = (
        struct.pack(">HHII", 0x9999, 5, 9, 2**31),
        struct.pack(">HHII", 0x0110, 2, 2**31, 90),
    )
    for more, count in (
        (b"", 1),
        (far, 2),
        (endless, 7),
    ):  # the others are broken beside a sound orientation
        for kind in ("PNG", "WEBP"):
            content = bytes_of(
                Image.fromarray(HALVES),
                kind,
                exif=exif(orientation, more, count),
                **({"lossless": True} if kind == "WEBP" else {}),
            )
            assert np.array_equal(np.asarray(load_image(content)), turned(HALVES)), (kind, count)


@pytest.mark.parametrize(
    "broken",
    [
        b"Exif\0\0",
        b"Exif\0\0MM",
        b"Exif\0\0XX\0*\0\0\0\x08",
        b"garbage",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30),
        exif(6).replace(b"\x01\x12\0\x03", b"\x01\x12\0\x05"),
        exif(6).replace(b"\x01\x12\0\x03", b"\x01\x12\xff\xff"),
    ],
)
@pytest.mark.reads("image", "broken EXIF", "ignored")
def test_broken_exif_leaves_the_picture_as_it_is_stored(broken, recwarn):
    for kind in ("PNG", "JPEG", "WEBP"):
        content = bytes_of(Image.new("RGB", (12, 8), "red"), kind, exif=broken)
        recwarn.clear()
        assert load_image(content).size == (12, 8)
        assert not len(recwarn)
        assert load_image(Image.open(io.BytesIO(content))).size == (12, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "ICO", "TGA"])
def test_broken_bytes_are_one_line(kind):
    random = np.random.RandomState(4)
    whole = bytes_of(Image.fromarray(random.randint(0, 255, (24, 24, 3), np.uint8)), kind)
    for _ in range(60):
        content = bytearray(whole[: random.randint(1, len(whole) + 1)])
        for _ in range(random.randint(0, 9)):
            content[random.randint(min(len(content), 200))] = random.randint(256)
        message = refusal(bytes(content), lambda image: image.mode == "RGB")
        assert message is None or message.isprintable()
        assert message is None or len(message) <= 500


# ------------------------------------------------------------------------------------- levels that
# PIL takes for others


def with_transparent(content: bytes, *levels: int) -> bytes:
    """A PNG with a transparent level or color (the chunk tRNS)."""
    chunk = b"tRNS" + struct.pack(f">{len(levels)}H", *levels)
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    begin = content.index(b"IDAT") - 4
    return content[:begin] + chunk + content[begin:]


@pytest.mark.parametrize(
    ("bits", "stored", "level", "expected"),
    [
        (2, [0b00_01_10_11], 2, [0, 85, 255, 255]),
        (2, [0b00_01_10_11], 0, [255, 85, 170, 255]),
        (4, [0x0F, 0x3C], 3, [0, 255, 255, 204]),
        (8, [0, 9, 200], 9, [0, 255, 200]),
        (16, [0, 0, 0x31, 0x07, 0x31, 0x08], 0x3107, [0, 255, 48]),
        (16, [0, 0, 0x31, 0x07, 0x31, 0x08], 0x31, [0, 48, 48]),
    ],
)
@pytest.mark.reads(
    "image",
    "PNG with a transparent level",
    "white there; refused with a transparent color of 16 bits",
)
def test_transparent_gray_levels(bits, stored, level, expected):
    content = png(bits, 0, np.array([stored], np.uint8)[..., None])
    width = len(stored) * 8 // bits
    head = content[:16] + struct.pack(">I", width) + content[20:29]
    content = head + struct.pack(">I", zlib.crc32(head[12:])) + content[33:]
    image = np.asarray(load_image(with_transparent(content, level)))
    assert image[0, :, 0].tolist() == expected


def test_a_transparent_color_of_16_bits_is_refused():
    levels = np.arange(5 * 7 * 6, dtype=np.uint8).reshape(5, 7, 6)
    content = png(16, 2, levels)
    assert load_image(content).size == (7, 5)
    refused(with_transparent(content, 1, 2, 3), "16 bits per color with a transparent color")
    levels = np.full((5, 7, 3), 9, np.uint8)
    assert np.asarray(load_image(with_transparent(png(8, 2, levels), 9, 9, 9))).min() == 255


def test_signed_tiffs_of_8_bits_are_refused():
    levels = (RAMP * 100).astype(np.int8)
    refused(tiff(8, 2, 1, levels), "signed integers, which do not tell their scale; expected")
    assert load_image(tiff(8, 1, 1, levels)).size == (7, 5)


@pytest.mark.parametrize("bits", [8, 16, -32])
@pytest.mark.reads("image", "FITS", "refused")
def test_fits_is_refused(bits):
    kind = {8: "u1", 16: ">i2", -32: ">f4"}[bits]
    cards = [
        "SIMPLE  =                    T",
        f"BITPIX  = {bits:20}",
        "NAXIS   =                    2",
        "NAXIS1  =                    7",
        "NAXIS2  =                    5",
        "END",
    ]
    header = "".join(card.ljust(80) for card in cards).encode().ljust(2880)
    refused(header + RAMP.astype(kind).tobytes().ljust(2880, b"\0"), "FITS", "expected 8 bits")


@pytest.mark.parametrize(
    ("pixels", "fits"),
    [("rgb24", True), ("gray", True), ("gray16le", True), ("rgb48le", False), ("rgba64le", False)],
)
@pytest.mark.reads("image", "JPEG 2000 in color of more than 8 bits", "refused")
def test_jpeg_2000_of_every_depth(pixels, fits):
    """PIL rounds a white of 16 bits to 256, which is 0."""
    encoder = av.CodecContext.create("jpeg2000", "w")
    encoder.width = encoder.height = 16
    encoder.pix_fmt, encoder.time_base = pixels, Fraction(1, 1)
    encoder.options = {"pred": "dwt53"}
    white = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 255, np.uint8), format="rgb24")
    frame = white.reformat(format=pixels)
    frame.pts = 0
    content = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    if fits:
        assert np.asarray(load_image(content)).min() >= 250
    else:
        refused(content, "JPEG 2000 in color of more than 8 bits")
