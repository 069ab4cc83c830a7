from __future__ import annotations

from math import prod

from hypothesis import given
from hypothesis import strategies as st

from hpcft.checkpoint.image import contradiction, header_length, lay_out
from hpcft.checkpoint.pieces import DTYPE_BYTES, Piece, TensorShape, assign, find_gap, index_digest, whole
from tests.search import sampled

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
tensors = st.builds(TensorShape, st.sampled_from(sorted(DTYPE_BYTES)), shapes)
indexes = st.dictionaries(st.text(min_size=1, max_size=4), tensors, max_size=12)


@sampled(300)
@given(indexes, st.integers(1, 9), st.integers(1, 500), st.data())
def test_shares_cover_every_tensor_exactly_once(
    index: dict[str, TensorShape], world_size: int, cut_above: int, data: st.DataObject
) -> None:
    pinned = frozenset(data.draw(st.lists(st.sampled_from(sorted(index)), unique=True))) if index else frozenset()
    shares = assign(index, world_size, pinned, cut_above)
    assert len(shares) == world_size
    pieces = [piece for share in shares for piece in share]
    assert find_gap(pieces) == ""
    assert {piece.name: TensorShape(piece.dtype, piece.shape) for piece in pieces} == index
    for rank, share in enumerate(shares):
        names = [piece.name for piece in share]
        assert len(set(names)) == len(names), "a file holds one piece of a tensor at most"
        assert rank == 0 or not pinned.intersection(names)
        lay_out(share)
    # Whatever the order in which a rank met its tensors, it computes the same.
    assert assign(dict(reversed(index.items())), world_size, pinned, cut_above) == shares


@sampled(100)
@given(indexes, st.integers(1, 6), st.data())
def test_anything_less_or_more_than_a_cover_is_found(
    index: dict[str, TensorShape], world_size: int, data: st.DataObject
) -> None:
    pieces = [piece for share in assign(index, world_size, cut_above=16) for piece in share]
    if not pieces:
        return
    victim = data.draw(st.sampled_from(pieces))
    assert "exactly once" in find_gap([*pieces, victim])
    rest = [piece for piece in pieces if piece is not victim]
    if any(piece.name == victim.name for piece in rest):
        assert "exactly once" in find_gap(rest)
    else:
        # The whole tensor is gone: the pieces alone cannot tell, the digest of the index does.
        left = {p.name: TensorShape(p.dtype, p.shape) for p in rest}
        assert index_digest(left) != index_digest(index)


def box(offsets: tuple[int, ...], extent: tuple[int, ...], shape: tuple[int, ...] = (4, 4)) -> Piece:
    return Piece("w", "F32", shape, offsets, extent)


def test_covers_of_all_kinds() -> None:
    rows = [box((0, 0), (1, 4)), box((1, 0), (3, 4))]
    grid = [box((a, b), (2, 2)) for a in (0, 2) for b in (0, 2)]
    staggered = [box((0, 0), (2, 3)), box((0, 3), (2, 1)), box((2, 0), (2, 1)), box((2, 1), (2, 3))]
    pinwheel = [
        *(box((0, 0), (1, 2), (3, 3)), box((0, 2), (2, 1), (3, 3)), box((2, 1), (1, 2), (3, 3))),
        *(box((1, 0), (2, 1), (3, 3)), box((1, 1), (1, 1), (3, 3))),
    ]
    for cover in (rows, grid, staggered, pinwheel):
        assert find_gap(cover) == ""
        assert find_gap(cover[::-1]) == ""
        assert find_gap(cover[:-1])
    assert find_gap([*pinwheel[:-1], box((0, 0), (1, 1), (3, 3))]), "as many elements, but one twice and one never"
    assert find_gap([box((0, 0), (2, 4)), box((1, 0), (2, 4))])
    assert find_gap([box((0, 0), (5, 4))])
    assert find_gap([box((0,), (4,))])
    assert find_gap([box((0, 0), (4, 4)), box((4, 0), (0, 4))])
    assert "F16" in find_gap([rows[0], Piece("w", "F16", (4, 4), (1, 0), (3, 4))])


def test_thousands_of_slabs_take_no_quadratic_time() -> None:
    shape = (20_000, 8)
    assert find_gap(box((row, 0), (1, 8), shape) for row in reversed(range(20_000))) == ""


def test_large_tensors_do_not_make_one_rank_slow() -> None:
    index = {"embedding": TensorShape("F32", (50_000, 768)), "head": TensorShape("F32", (1, 50_000, 768))}
    index |= {f"layer{n}": TensorShape("F32", (768, 3072)) for n in range(12)}
    total = sum(tensor.nbytes for tensor in index.values())
    for ranks in (2, 4):
        loads = [sum(piece.nbytes for piece in share) for share in assign(index, ranks)]
        assert max(loads) < 1.1 * total / ranks


@sampled(200)
@given(indexes)
def test_image_is_aligned_and_without_holes(index: dict[str, TensorShape]) -> None:
    image = lay_out(whole(name, tensor) for name, tensor in index.items())
    assert len(image.header) % 4096 == 0
    assert header_length(image.header[:8]) == len(image.header)
    reached = len(image.header)
    for placed in image.placed:
        assert placed.begin == reached
        assert placed.begin % DTYPE_BYTES[placed.piece.dtype] == 0
        reached += prod(placed.piece.extent) * DTYPE_BYTES[placed.piece.dtype]
        assert placed.end == reached
    assert image.size == reached
    assert contradiction(image.header, image.placed) == ""
    if image.placed:
        assert contradiction(image.header, image.placed[1:])


def test_image_depends_on_the_pieces_alone() -> None:
    index = {"b": TensorShape("BF16", (3,)), "a": TensorShape("F64", ()), "c": TensorShape("U8", (7,))}
    one = lay_out(whole(name, tensor) for name, tensor in index.items())
    other = lay_out(whole(name, tensor) for name, tensor in reversed(index.items()))
    assert one == other
    assert [placed.piece.name for placed in one.placed] == ["a", "b", "c"]
