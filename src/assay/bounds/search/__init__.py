"""The search for tight bounds: slopes by gradient, boxes split, and the sound recomputation."""
