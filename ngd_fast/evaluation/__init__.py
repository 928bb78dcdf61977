"""Metrics over both protocols, bootstrap intervals, comparisons, tables and figures of predictions."""
