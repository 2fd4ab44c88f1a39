"""Interval and linear bounds: outward rounding, bound propagation, bound functions of the mechanism kinds."""
