"""Definitions that the plain and the fused operations share. None of these modules imports an operation."""
