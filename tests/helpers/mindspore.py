"""Bytes of checkpoints as MindSpore writes them."""

import zlib

import torch

TYPES = {
    torch.float16: "Float16",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float32",
    torch.float64: "Float64",
    torch.int8: "Int8",
    torch.int32: "Int32",
    torch.int64: "Int64",
    torch.uint8: "UInt8",
    torch.uint16: "UInt16",
    torch.bool: "Bool",
}


def varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def block(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def value(tag: str, dims: list[int], tensor_type: str, content: bytes, packed: bool = False) -> bytes:
    """One parameter as MindSpore writes it; negative dims as protobuf does, in ten bytes."""
    numbers = [varint(dim % 2**64) for dim in dims]
    shape = block(1, b"".join(numbers)) if packed else b"".join(b"\x08" + number for number in numbers)
    tensor = shape + block(2, tensor_type.encode()) + block(3, content)
    return block(1, block(1, tag.encode()) + block(2, tensor))


def content_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def checkpoint(tensors: dict[str, torch.Tensor], piece: int = 2**29, crc: bool = False) -> bytes:
    out = b""
    for tag, tensor in tensors.items():
        content = content_of(tensor)
        for at in range(0, max(len(content), 1), piece):
            out += value(tag, list(tensor.shape), TYPES[tensor.dtype], content[at : at + piece])
    return out + (b"crc_num" + zlib.crc32(out).to_bytes(10, "big") if crc else b"")
