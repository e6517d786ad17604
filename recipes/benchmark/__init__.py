"""Measures what a step costs in time, memory and operations, relative to the plain step."""
