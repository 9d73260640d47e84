from dataclasses import dataclass

import pytest
import torch

from colt5_bench.case import Case, other_values


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
    SHAPES = (2, 3), (4,)

    def normal(self, case):
        return case.normal(torch.device("cpu"), *self.SHAPES)

    def test_numbers_are_those_of_the_generator(self):
        generator = Shape(8, 0.03).generator()
        expected = [torch.randn(shape, generator=generator) for shape in self.SHAPES]
        for _ in range(2):
            assert all(map(torch.equal, self.normal(Shape(8, 0.03)), expected))

    def test_who_writes_to_them_changes_no_others(self):
        first, second = (self.normal(Shape(8, 0.03)) for _ in range(2))
        expected = [each.clone() for each in first]
        for each in second:
            each.zero_()
        assert all(map(torch.equal, first, expected))
        assert all(map(torch.equal, self.normal(Shape(8, 0.03)), expected))

    def test_they_are_drawn_once_for_both_directions_though_others_are_drawn_between(self, monkeypatch):
        drawn, draw = [], torch.randn
        monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(args) or draw(*args, **kwargs))
        case = OtherShape(1, 0.5)
        for secret in ("forward", "forward+backward"):
            for _ in ("an operation", "another"):
                first = self.normal(case)
                with other_values(secret):
                    assert not torch.equal(self.normal(case)[0], first[0])
        assert len(drawn) == 3 * len(self.SHAPES)

    def test_many_are_not_kept(self, monkeypatch):
        monkeypatch.setattr("colt5_bench.case.MOST_KEPT", 9)
        drawn, draw = [], torch.randn
        monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(args) or draw(*args, **kwargs))
        for _ in range(2):
            self.normal(OtherShape(2, 0.5))
        assert len(drawn) == 2 * len(self.SHAPES)

    @pytest.mark.gpu
    def test_a_gpu_draws_other_values_itself_and_may_not_draw_the_first(self):
        case, device = Shape(8, 0.03), torch.device("cuda")
        assert all(map(torch.equal, (each.cpu() for each in case.normal(device, *self.SHAPES)), self.normal(case)))
        with other_values("secret"):
            first, second = (case.normal(device, *self.SHAPES) for _ in range(2))
        with other_values("another"):
            third = case.normal(device, *self.SHAPES)
        assert all(map(torch.equal, first, second))
        assert not torch.equal(first[0], third[0])
