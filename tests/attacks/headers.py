"""Attacks in the bytes of one safetensors file."""

from pathlib import Path

from tests.attacks.making import attack, dumped, entry, healthy, packed, two_tensors, with_header, with_shard


@attack("at least 8 bytes", "0 bytes")
def an_empty_file(root: Path) -> Path:
    return with_shard(root, b"")


@attack("Git LFS pointer", "git lfs pull")
def a_git_lfs_pointer(root: Path) -> Path:
    return with_shard(root, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 96\n")


@attack("tensor 'b.weight'", "truncated")
def truncated_data(root: Path) -> Path:
    shard = (healthy(root) / "model.safetensors").read_bytes()
    return with_shard(root, shard[:-1])


@attack("a header of", "ends after 40 bytes")
def truncated_header(root: Path) -> Path:
    shard = (healthy(root) / "model.safetensors").read_bytes()
    return with_shard(root, shard[:40])


@attack("1 trailing bytes")
def trailing_bytes(root: Path) -> Path:
    return with_header(root, two_tensors(), data_bytes=97)


@attack("1000000 trailing bytes")
def a_second_file_behind_the_first(root: Path) -> Path:
    return with_header(root, two_tensors(), data_bytes=96 + 1_000_000)


@attack("at most 16000000 bytes", str(2**63))
def header_length_beyond_any_file(root: Path) -> Path:
    return with_shard(root, packed(b"{}", length=2**63))


@attack("at most 16000000 bytes")
def header_of_17_mb(root: Path) -> Path:
    return with_shard(root, packed(b"{" + b" " * 17_000_000 + b"}"))


@attack("at most 100000 tensors")
def more_tensors_than_anybody_needs(root: Path) -> Path:
    member = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return with_shard(root, packed(b"{" + b",".join(member % n for n in range(240_000)) + b"}"))


@attack("at most 100000 tensors")
def more_tensors_with_an_emoji_among_them(root: Path) -> Path:
    member = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = b'{"__metadata__":{"a":"\xf0\x9f\x98\x80"},' + b",".join(member % n for n in range(240_000)) + b"}"
    return with_shard(root, packed(header))


@attack("a header that begins with `{`", "' {")
def header_that_begins_with_a_space(root: Path) -> Path:
    return with_header(root, b" " + dumped(two_tensors()))


@attack("a header that begins with `{`")
def header_that_is_a_list(root: Path) -> Path:
    return with_header(root, b"[]", data_bytes=0)


@attack("`,` or `}`")
def header_that_ends_early(root: Path) -> Path:
    return with_header(root, dumped(two_tensors())[:-1])


@attack("nothing after the object")
def header_with_a_second_object(root: Path) -> Path:
    return with_header(root, dumped(two_tensors()) + b"{}")


@attack("a header in UTF-8")
def header_that_is_no_utf8(root: Path) -> Path:
    return with_header(root, dumped({"__metadata__": {"a": "?"}} | two_tensors()).replace(b"?", b"\xff"))


@attack("__metadata__", "texts to texts")
def metadata_that_is_nested(root: Path) -> Path:
    return with_header(root, {"__metadata__": {"a": {"b": "c"}}} | two_tensors())


@attack("a JSON value of at most 1000000 characters")
def metadata_of_ten_megabytes(root: Path) -> Path:
    return with_header(root, {"__metadata__": {"a": "x" * 10_000_000}} | two_tensors())


@attack("a JSON value of at most 4096 characters")
def an_entry_of_a_megabyte(root: Path) -> Path:
    return with_header(root, {"a.weight": {"dtype": "U8", "shape": [1] * 500_000, "data_offsets": [0, 1]}})


@attack("valid JSON")
def an_entry_that_nests_without_end(root: Path) -> Path:
    return with_header(root, b'{"a":' + b"[" * 4000)


@attack("'a.weight' twice")
def a_tensor_twice(root: Path) -> Path:
    header = dumped(two_tensors()).replace(b"b.weight", b"a.weight")
    return with_header(root, header)


@attack("'dtype' twice")
def a_dtype_twice(root: Path) -> Path:
    header = dumped(two_tensors()).replace(b'{"dtype": "BF16"', b'{"dtype": "F16", "dtype": "BF16"', 1)
    return with_header(root, header)


@attack("twice in one object")
def a_tensor_twice_by_an_escape(root: Path) -> Path:
    header = dumped(two_tensors()).replace(b"b.weight", b"\\u0061.weight")
    return with_header(root, header)


def _renamed(root: Path, name: str) -> Path:
    return with_header(root, {name: entry("BF16", [4, 4], 0, 32)}, data_bytes=32)


@attack("tensor names", "'../../etc/passwd'")
def a_name_that_climbs(root: Path) -> Path:
    return _renamed(root, "../../etc/passwd")


@attack("tensor names", "'/etc/passwd'")
def a_name_that_is_absolute(root: Path) -> Path:
    return _renamed(root, "/etc/passwd")


@attack("tensor names", "'a\\\\b'")
def a_name_with_a_backslash(root: Path) -> Path:
    return _renamed(root, "a\\b")


@attack("tensor names", "'a\\x00b'")
def a_name_with_a_nul(root: Path) -> Path:
    return _renamed(root, "a\0b")


@attack("tensor names", "'\\x1b[2J'")
def a_name_that_clears_the_terminal(root: Path) -> Path:
    return _renamed(root, "\x1b[2J")


@attack("tensor names", "''")
def a_name_that_is_empty(root: Path) -> Path:
    return _renamed(root, "")


@attack("tensor names")
def a_name_of_a_thousand_characters(root: Path) -> Path:
    return _renamed(root, "x" * 1000)


@attack("tensor 'b.weight'", "a gap before it")
def a_gap(root: Path) -> Path:
    return with_header(root, two_tensors() | {"b.weight": entry("BF16", [2, 16], 40, 104)}, data_bytes=104)


@attack("tensor 'a.weight'", "a gap before it")
def a_gap_at_the_start(root: Path) -> Path:
    return with_header(root, {"a.weight": entry("BF16", [4, 4], 8, 40)}, data_bytes=40)


@attack("tensor 'b.weight'", "an overlap")
def an_overlap(root: Path) -> Path:
    return with_header(root, two_tensors() | {"b.weight": entry("BF16", [2, 16], 16, 80)}, data_bytes=80)


@attack("tensor 'b.weight'", "an overlap")
def two_tensors_in_one_place(root: Path) -> Path:
    same = entry("BF16", [4, 4], 0, 32)
    return with_header(root, {"a.weight": same, "b.weight": same}, data_bytes=32)


def _entry(root: Path, value: object, data_bytes: int = 32) -> Path:
    return with_header(root, {"a.weight": value}, data_bytes=data_bytes)


@attack("tensor 'a.weight'", "32 bytes for BF16 [4, 4]", "30")
def fewer_bytes_than_the_shape_needs(root: Path) -> Path:
    return _entry(root, entry("BF16", [4, 4], 0, 30), data_bytes=30)


@attack("tensor 'a.weight'", "32 bytes for BF16 [4, 4]", "40")
def more_bytes_than_the_shape_needs(root: Path) -> Path:
    return _entry(root, entry("BF16", [4, 4], 0, 40), data_bytes=40)


@attack("tensor 'a.weight'", "a dtype out of", "'F4'")
def a_dtype_below_one_byte(root: Path) -> Path:
    return _entry(root, entry("F4", [8, 8], 0, 32))


@attack("tensor 'a.weight'", "a dtype out of", "'os.system'")
def a_dtype_that_is_none(root: Path) -> Path:
    return _entry(root, entry("os.system", [4, 4], 0, 32))


@attack("tensor 'a.weight'", "a dtype out of", "['BF16']")
def a_dtype_that_cannot_be_hashed(root: Path) -> Path:
    return _entry(root, {"dtype": ["BF16"], "shape": [4, 4], "data_offsets": [0, 32]})


@attack("tensor 'a.weight'", "at most 8 dimensions")
def nine_dimensions(root: Path) -> Path:
    return _entry(root, entry("BF16", [1] * 8 + [16], 0, 32))


@attack("tensor 'a.weight'", "integers >= 0", "-4")
def a_negative_shape(root: Path) -> Path:
    return _entry(root, entry("BF16", [-4, -4], 0, 32))


@attack("tensor 'a.weight'", "integers >= 0", "4.0")
def a_shape_of_floats(root: Path) -> Path:
    return _entry(root, {"dtype": "BF16", "shape": [4.0, 4.0], "data_offsets": [0, 32]})


@attack("tensor 'a.weight'", "integers >= 0", "True")
def a_shape_of_booleans(root: Path) -> Path:
    return _entry(root, {"dtype": "BF16", "shape": [True, 16], "data_offsets": [0, 32]})


@attack("tensor 'a.weight'", "multiply to less than 2**63")
def a_shape_that_holds_nothing_and_overflows(root: Path) -> Path:
    return _entry(root, entry("BF16", [0, 2**62, 4], 0, 0), data_bytes=0)


@attack("tensor 'a.weight'", "multiply to less than 2**63")
def a_shape_that_wraps_to_the_right_size(root: Path) -> Path:
    return _entry(root, entry("BF16", [2**61 + 2, 8], 0, 32))


@attack("tensor 'a.weight'", "begin <= end", "[32, 0]")
def offsets_that_run_backwards(root: Path) -> Path:
    return _entry(root, entry("BF16", [4, 4], 32, 0))


@attack("tensor 'a.weight'", "begin <= end")
def three_offsets(root: Path) -> Path:
    return _entry(root, {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 16, 32]})


@attack("tensor 'a.weight'", "begin <= end")
def offsets_beyond_64_bits(root: Path) -> Path:
    return _entry(root, entry("BF16", [4, 4], 0, 2**70))


@attack("tensor 'a.weight'", "the keys dtype, shape and data_offsets")
def an_entry_with_a_key_more(root: Path) -> Path:
    return _entry(root, entry("BF16", [4, 4], 0, 32) | {"file": "../other"})


@attack("tensor 'a.weight'", "the keys dtype, shape and data_offsets")
def an_entry_that_is_a_text(root: Path) -> Path:
    return _entry(root, "BF16")


@attack("at least one tensor")
def no_tensor_at_all(root: Path) -> Path:
    return with_header(root, {}, data_bytes=0)


@attack("1 trailing bytes")
def a_header_that_is_as_large_as_allowed(root: Path) -> Path:
    member = b'"%0106d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return with_header(root, b"{" + b",".join(member % n for n in range(100_000)) + b"}", data_bytes=1)
