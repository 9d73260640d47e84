from dataclasses import dataclass

import pytest
import torch

from colt5_bench.case import Case


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
