"""Random numbers belong to a row: whatever rows are beside it, and however they are shared out."""
import torch

from noise import Rows, normal, rows_along, rows_at, rows_cut, shared, uniform

SEEDS = [7, 8, 9]


def rows(*which):
    return Rows([SEEDS[i] for i in which], 1, "cpu")


def test_a_row_has_the_same_numbers_alone_and_among_others():
    together = rows(0, 1, 2)
    alone = rows(1)
    for draw in (normal, uniform):
        whole = draw((3, 5, 2), together, "cpu")
        assert torch.equal(whole[1:2], draw((1, 5, 2), alone, "cpu"))
        assert not torch.equal(whole[0], whole[1])


def test_repeats_stand_before_the_rows():
    whole = normal((4, 3, 5), rows_along(rows(0, 1, 2), 1), "cpu")
    assert torch.equal(whole[:, 2:], normal((4, 1, 5), rows_along(rows(2), 1), "cpu"))


def test_positions_that_count_are_those_of_their_row():
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    whole = normal((6, 2), rows_at(rows(0, 1, 2), valid), "cpu")
    assert torch.equal(whole[3:], normal((3, 2), rows_at(rows(2), valid[2:]), "cpu"))


def test_numbers_of_a_row_do_not_depend_on_where_the_micro_batch_is_cut():
    long = normal((2, 7, 3), rows_cut(rows(0, 1), 9), "cpu")
    short = normal((1, 4, 3), rows_cut(rows(1), 9), "cpu")
    assert torch.equal(long[1:, :4], short)


def test_what_all_rows_share_does_not_depend_on_them():
    first, second = (torch.randint(1000, (5,), generator=shared(rows(*which)))
                     for which in ((0,), (1, 2)))
    assert torch.equal(first, second)


def test_a_generator_and_none_pass_through():
    generator = torch.Generator().manual_seed(3)
    expected = torch.randn(2, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(normal((2, 2), rows_at(rows_cut(generator, 9), None), "cpu"), expected)
    assert rows_at(None, None) is None and shared(None) is None
