"""What pyproject.toml cannot say: data/ and scripts/ of a checkout are installed inside the package milepost."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["milepost*", "models"]), "milepost.data", "milepost.scripts"],
    package_dir={"milepost.data": "data", "milepost.scripts": "scripts"},
    package_data={
        "milepost": ["py.typed"],
        "milepost.text": ["gpt2/*"],
        "milepost.page": ["static/*", "static/uplot/*"],
        "milepost.data": ["dear_wren.md"],
    },
)
