"""The public API: what `libmesh` exports is there, is documented, and is all that its users see."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import libmesh
import libmesh.testing


def test_all_is_sorted_and_everything_in_it_is_there() -> None:
    assert list(libmesh.__all__) == sorted(libmesh.__all__, key=lambda name: (name[0].islower(), name))
    for name in libmesh.__all__:
        assert hasattr(libmesh, name)


@pytest.mark.parametrize("name", libmesh.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(libmesh, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"libmesh.{name} has no docstring"


@pytest.mark.parametrize(
    "name", [name for name in libmesh.__all__ if inspect.isclass(getattr(libmesh, name))]
)
def test_every_public_method_is_documented(name: str) -> None:
    for method, value in vars(getattr(libmesh, name)).items():
        if not method.startswith("_") and (
            inspect.isfunction(value) or isinstance(value, (property, classmethod))
        ):
            assert inspect.getdoc(value), f"libmesh.{name}.{method} has no docstring"


@pytest.mark.parametrize("name", ["MemoryHub", "check_network", "RULES"])
def test_what_others_test_with_is_where_they_are_told(name: str) -> None:
    assert name in libmesh.testing.__all__
    assert getattr(libmesh.testing, name)


CONFIGS = [
    getattr(libmesh, name)
    for name in libmesh.__all__
    if name.endswith("Config") and dataclasses.is_dataclass(getattr(libmesh, name))
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_of_a_configuration_is_documented_frozen_and_has_a_default(config: type) -> None:
    text = inspect.getdoc(config) or ""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        assert field.name in text, f"{config.__name__}.{field.name} is not documented"
    made = config()
    assert not hasattr(made, "__dict__"), "not slotted"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(config)[0].name, None)  # type: ignore[arg-type]


def test_every_error_is_a_mesh_error() -> None:
    for name in libmesh.__all__:
        value = getattr(libmesh, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            assert issubclass(value, libmesh.MeshError), name
