"""Fused operators: schema, reference, providers."""
