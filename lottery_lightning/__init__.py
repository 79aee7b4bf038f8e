"""Lottery Lightning: finds lottery tickets, proves what they are, and hands them on."""

__version__ = "0.1.0"
