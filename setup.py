"""Nothing but the call: the package is described in setup.cfg."""

from setuptools import setup

setup()
