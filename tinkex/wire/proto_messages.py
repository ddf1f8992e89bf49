"""Builds protobuf message classes from a table of fields.

A table names a message and indents its fields: number, type, name; "oneof:NAME" marks mutually
exclusive fields. Messages and fields that are never sent or read are omitted: the reader skips
unknown fields.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError as ProtobufError

from tinkex.wire.problems import DecodeError

PACKAGE = "tinker_public"

ENUMS = {
    "StopReason": ("STOP_REASON_STOP", "STOP_REASON_LENGTH"),
    "DType": (
        "DTYPE_UNSPECIFIED",
        "DTYPE_FLOAT32",
        "DTYPE_INT64",
        "DTYPE_INT32",
        "DTYPE_BFLOAT16",
    ),
}

_Field = descriptor_pb2.FieldDescriptorProto


def build(table: str) -> dict[str, Any]:
    """The message classes of *table*, by name.

    They get a separate pool, because the official SDK registers the same names in protobuf's
    default pool, which is shared by the process.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name="tinker_public.proto", package=PACKAGE, syntax="proto3"
    )
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for line in filter(None, table.splitlines()):
        if line.startswith(" "):
            _add_field(file.message_type[-1], line.split())
        else:
            file.message_type.add(name=line)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{PACKAGE}.{message.name}")
        )
        for message in file.message_type
    }


def _add_field(message: descriptor_pb2.DescriptorProto, words: list[str]) -> None:
    number, *kind, name = [word for word in words if not word.startswith("oneof:")]
    oneof = words[-1].partition("oneof:")[2]
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind[0] in ("repeated", "map"):
        field.label = _Field.LABEL_REPEATED
    if kind[0] == "map":
        kind[-1] = f"{message.name}.{_add_map_entry(message, name, kind[-1])}"
    if kind[0] == "optional":
        field.proto3_optional = True
        oneof = f"_{name}"
    _set_type(field, kind[-1])
    if oneof:
        if oneof not in [known.name for known in message.oneof_decl]:
            message.oneof_decl.add(name=oneof)
        field.oneof_index = [known.name for known in message.oneof_decl].index(oneof)


def _add_map_entry(message: descriptor_pb2.DescriptorProto, name: str, kind: str) -> str:
    """A map is a repeated message of key and value."""
    entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
    entry.options.map_entry = True
    _add_field(entry, ["1", "string", "key"])
    _add_field(entry, ["2", kind, "value"])
    return entry.name


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind[0].islower():
        field.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    else:
        field.type = _Field.TYPE_ENUM if kind in ENUMS else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


def parse(message_class: Any, body: bytes) -> Any:
    """Read *body* as a message. Raises DecodeError if it is not a complete one."""
    message = message_class()
    try:
        message.ParseFromString(body)
    except ProtobufError as exc:
        raise DecodeError(
            f"these {len(body)} bytes are not a complete {message_class.DESCRIPTOR.name} message "
            f"({exc}); they begin with {bytes(body[:16]).hex()!r}."
        ) from exc
    return message
