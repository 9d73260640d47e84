from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

from colt5_bench.case import Case, drawing_once, other_values


@dataclass(frozen=True)
class Shape(Case):
    rows: int
    eps: float
    dtype: object = torch.float32


@dataclass(frozen=True)
class OtherShape(Shape):
    pass


def test_id_names_every_field_as_a_reader_writes_it():
    assert Shape(8, 0.03, torch.bfloat16).id == "rows=8,eps=0.03,dtype=bfloat16"
    assert Shape(8, 4.0).id == "rows=8,eps=4,dtype=float32"


def test_fields_are_those_of_the_id():
    assert Shape(8, 0.03, "float16").fields() == {"rows": 8, "eps": 0.03, "dtype": "float16"}


def test_the_same_case_has_the_same_numbers():
    first, second = (torch.randn(100, generator=Shape(8, 0.03).generator()) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("other", [Shape(9, 0.03), Shape(8, 0.04), OtherShape(8, 0.03)])
def test_another_case_has_other_numbers(other):
    first, second = (torch.randn(100, generator=case.generator()) for case in (Shape(8, 0.03), other))
    assert not torch.equal(first, second)


class TestNormal:
    def test_numbers_are_those_of_the_generator(self):
        generator = Shape(8, 0.03).generator()
        expected = [torch.randn(shape, generator=generator) for shape in ((2, 3), (4,))]
        for drawing in (nullcontext, drawing_once):
            with drawing():
                assert all(map(torch.equal, Shape(8, 0.03).normal((2, 3), (4,)), expected))

    def test_they_are_drawn_once_while_that_lasts(self):
        case = Shape(8, 0.03)
        with drawing_once():
            first = case.normal((2, 3))
            assert case.normal((2, 3)) is first
            assert not torch.equal(case.normal((6,))[0], OtherShape(8, 0.03).normal((6,))[0])
            with other_values("secret"):
                others = case.normal((2, 3))
                assert not torch.equal(others[0], first[0])
                assert case.normal((2, 3)) is others
            with other_values("another"):
                assert not torch.equal(case.normal((2, 3))[0], others[0])
        with drawing_once():
            assert case.normal((2, 3)) is not first

    def test_only_so_many_are_kept(self, monkeypatch):
        monkeypatch.setattr("colt5_bench.case.MOST_KEPT", 10)
        case = Shape(8, 0.03)
        with drawing_once():
            kept = case.normal((2, 3))
            assert case.normal((5,)) is not case.normal((5,))
            assert case.normal((4,)) is case.normal((4,))
            assert case.normal((2, 3)) is kept
