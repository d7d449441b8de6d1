"""Writes the reference of the gRPC API, `docs/reference/*.md`, from the protos and their comments.

`python tools/api_reference.py`, which `make protos` runs. A page for each file of `protos/`; the table of all
RPCs stands in `docs/reference/index.md` between `<!-- rpcs -->` and `<!-- /rpcs -->`. A test holds them
fresh. Knows the shape of a descriptor, and of the API only where each file's page is.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Final

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT: Final = Path(__file__).resolve().parent.parent
FOLDER: Final = ROOT / "docs" / "reference"
INDEX: Final = FOLDER / "index.md"

PAGES: Final = {
    "llm_service": ("llm", "Asking: the llm"),
    "pruner_service": ("pruner", "Pruning: the pruner"),
    "encoder_service": ("encoder", "Encoding: the encoder"),
    "media": ("media", "Pictures and videos"),
    "tensor": ("tensor", "Tensors"),
}
"""Page and title of each file, in the order in which they are to be read."""

_SCALARS: Final = {
    value.number: value.name.removeprefix("TYPE_").lower()
    for value in descriptor_pb2.FieldDescriptorProto.Type.DESCRIPTOR.values
}
_REPEATED: Final = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
# words of a comment: code as it stands, then what may be a name of the API, a setting's, or a constant's
_WORD: Final = re.compile(
    r"`[^`]+`|\b[A-Z]\w*\.[a-z_]+\b|\b(?:[A-Z][a-z0-9]+){2,}\b|\b\w+_\w+\b|\b[A-Z]{4,}\b"
)
_PLAIN: Final = frozenset({"JPEG", "WEBP", "EXIF", "HMAC", "IEEE"})


def described() -> list[descriptor_pb2.FileDescriptorProto]:
    """Every file of `protos/`, comments included. Raises SystemExit when protoc fails."""
    protos = sorted(str(path) for path in (ROOT / "protos").rglob("*.proto"))
    with tempfile.NamedTemporaryFile(suffix=".bin") as out:
        arguments = [
            "protoc",
            f"--proto_path={ROOT / 'protos'}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            "--include_source_info",
            f"--descriptor_set_out={out.name}",
            *protos,
        ]
        if code := protoc.main(arguments):
            raise SystemExit(code)
        return list(descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes()).file)


@dataclass(slots=True)
class Api:
    """All files at once: where each name is described, and who uses each type."""

    protos: Sequence[descriptor_pb2.FileDescriptorProto]
    places: dict[str, str] = field(default_factory=dict)
    """Page, by the name of a service, RPC, message or enum."""
    fields: dict[str, set[str]] = field(default_factory=dict)
    """Fields, by message."""
    users: dict[str, list[str]] = field(default_factory=dict)
    """Fields and RPCs that have a type, by the type's name."""

    def __post_init__(self) -> None:
        for proto in self.protos:
            if any(message.nested_type or message.enum_type for message in proto.message_type):
                raise ValueError(f"{proto.name}: types within messages have no place in the reference")
            page = PAGES[Path(proto.name).stem][0]
            for service in proto.service:
                names = [service.name, *(rpc.name for rpc in service.method)]
                self.places |= dict.fromkeys(names, page)
                for rpc in service.method:
                    for kind in (rpc.input_type, rpc.output_type):
                        self.users.setdefault(_short(kind), []).append(rpc.name)
            self.places |= dict.fromkeys((message.name for message in proto.message_type), page)
            self.places |= dict.fromkeys((enum.name for enum in proto.enum_type), page)
            for message in proto.message_type:
                self.fields[message.name] = {each.name for each in message.field}
                for each in message.field:
                    if each.type_name:
                        self.users.setdefault(_short(each.type_name), []).append(
                            f"{message.name}.{each.name}"
                        )

    def link(self, name: str, page: str, shown: str = "") -> str:
        """A link from `page` to what describes a name; the name alone where nothing of ours does."""
        there = self.places.get(name)
        shown = f"`{shown or name}`"
        return f"[{shown}]({'' if there == page else f'{there}.md'}#{name.lower()})" if there else shown

    def prose(self, comment: str, page: str, about: str) -> str:
        """A comment as Markdown: names of the API but what it is `about` are links, other names are code."""

        def word(match: re.Match[str]) -> str:
            name = match[0]
            bare = name.strip("`")
            owner, dot, member = bare.partition(".")
            if dot and member in self.fields.get(owner, ()):
                return self.link(owner, page, bare) if owner != about else f"`{bare}`"
            if dot and not name.startswith("`"):
                return name  # a sentence's end without a space, or somebody else's
            if bare in self.places and bare != about and re.search(r"[a-z][A-Z]", bare):
                return self.link(bare, page)
            is_code = name.startswith("`") or "_" in name or (name.isupper() and name not in _PLAIN)
            return f"`{bare}`" if is_code else name

        return _WORD.sub(word, re.sub(r"\s*\n\s*", " ", comment.strip()).replace("|", r"\|"))


def pages() -> dict[str, str]:
    """The text of every generated page, by its name without `.md`."""
    api = Api(described())
    found = {}
    for proto in api.protos:
        page, title = PAGES[Path(proto.name).stem]
        found[page] = "\n".join(_page(api, proto, page, title)) + "\n"
    return found


def refreshed(text: str) -> str:
    """The index with its table made anew. Raises ValueError when the markers are not there, once each."""
    start, end = "<!-- rpcs -->", "<!-- /rpcs -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {start} and {end} once each")
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{rpcs()}\n{end}{after}"


def rpcs() -> str:
    """A table of all RPCs."""
    api = Api(described())
    by_page = {PAGES[Path(proto.name).stem][0]: proto for proto in api.protos}
    lines = ["| service | RPC | what it does |", "|---|---|---|"]
    for page, _ in PAGES.values():
        proto = by_page[page]
        said = _comments(proto)
        for i, service in enumerate(proto.service):
            for j, rpc in enumerate(service.method):
                names = (api.link(service.name, "index") if not j else "", api.link(rpc.name, "index"))
                lines.append(f"| {' | '.join(names)} | {api.prose(said[6, i, 2, j], 'index', rpc.name)} |")
    return "\n".join(lines)


def _page(api: Api, proto: descriptor_pb2.FileDescriptorProto, page: str, title: str) -> Iterator[str]:
    said = _comments(proto)
    yield f"# {title}"
    yield f"<!-- made by tools/api_reference.py from protos/{proto.name}: make protos -->"
    yield ""
    # what is said above `package`, of the whole file
    yield api.prose(said[(2,)], page, "")
    yield ""
    yield f"Package `{proto.package}`, file `{proto.name}`."
    for i, service in enumerate(proto.service):
        yield from ("", f"## {service.name}", api.prose(said[6, i], page, service.name))
        for j, rpc in enumerate(service.method):
            stream = "a stream of " if rpc.server_streaming else ""
            takes, gives = (api.link(_short(kind), page) for kind in (rpc.input_type, rpc.output_type))
            yield from ("", f"### {rpc.name}", f"{takes} → {stream}{gives}", "")
            yield api.prose(said[6, i, 2, j], page, rpc.name)
    if proto.message_type:
        yield from ("", "## Messages")
    for i, message in enumerate(proto.message_type):
        yield from _message(api, message, said, (4, i), page)
    if proto.enum_type:
        yield from ("", "## Enumerations")
    for i, enum in enumerate(proto.enum_type):
        yield from ("", f"### {enum.name}", api.prose(said[5, i], page, enum.name))
        yield from _used(api, enum.name, page)
        yield from ("", "| value | no. | meaning |", "|---|---|---|")
        for j, value in enumerate(enum.value):
            yield f"| `{value.name}` | {value.number} | {api.prose(said[5, i, 2, j], page, enum.name)} |"


def _message(
    api: Api,
    message: descriptor_pb2.DescriptorProto,
    said: dict[tuple[int, ...], str],
    path: tuple[int, int],
    page: str,
) -> Iterator[str]:
    yield from ("", f"### {message.name}", api.prose(said[path], page, message.name))
    yield from _used(api, message.name, page)
    if not message.field:
        return
    yield from ("", "| field | no. | type | meaning |", "|---|---|---|---|")
    told: set[int] = set()
    for i, each in enumerate(message.field):
        within = each.HasField("oneof_index") and not each.proto3_optional
        if within and each.oneof_index not in told:
            told.add(each.oneof_index)
            what = api.prose(said[*path, 8, each.oneof_index], page, message.name)
            yield f"| `{message.oneof_decl[each.oneof_index].name}` | | one of | {what} |"
        name = f"{'↳ ' if within else ''}`{each.name}`"
        what = api.prose(said[*path, 2, i], page, message.name)
        yield f"| {name} | {each.number} | {_type(api, each, page)} | {what} |"


def _type(api: Api, each: descriptor_pb2.FieldDescriptorProto, page: str) -> str:
    """`repeated View`, `optional double`: the label where there is one, and the type."""
    label = "repeated " if each.label == _REPEATED else "optional " if each.proto3_optional else ""
    name = api.link(_short(each.type_name), page) if each.type_name else f"`{_SCALARS[each.type]}`"
    return label + name


def _used(api: Api, name: str, page: str) -> Iterator[str]:
    """Where a type is used, as one line behind its description; nothing for what no field and no RPC has."""
    links = [api.link(user.partition(".")[0], page, user) for user in api.users.get(name, ())]
    if links:
        yield from ("", f"*Used in* {', '.join(links)}.")


def _short(name: str) -> str:
    """The name without its package where that is ours: `.hiprune.v1.View` is View."""
    return name.removeprefix(".hiprune.v1.").removeprefix(".")


def _comments(proto: descriptor_pb2.FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """What stands above each declaration, by its path of field numbers, as protoc counts."""
    return {tuple(place.path): place.leading_comments for place in proto.source_code_info.location}


def main() -> None:
    """Rewrites the pages."""
    for name, text in pages().items():
        (FOLDER / f"{name}.md").write_text(text, "utf-8")
    INDEX.write_text(refreshed(INDEX.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
