"""What a layout will need and cost, from formulas: memory by stage, time by part, and the best layout."""
