"""The picture of a fused network as an SVG file: `explain --svg`."""
