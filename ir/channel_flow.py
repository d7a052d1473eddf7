"""Moved to `ir.channels`; this file goes as soon as nobody imports it."""

from ir.channels.flow import Map

__all__ = ["Map"]
