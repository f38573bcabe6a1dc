"""The two things that pyproject.toml cannot say: the cffi module and the abi3 wheel tag."""

import sysconfig

from setuptools import setup

abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}
setup(cffi_modules=["csrc/cffi_build.py:ffi"], options={"bdist_wheel": abi3})
