"""A process between callers and servers: accepts at any address and forwards to any other."""

from .config import Config, ConfigError, load
from .service import Sidecar

__all__ = ["Config", "ConfigError", "Sidecar", "load"]
