"""Making what a FLUX does visible and comparable: block predictions, lens, sheets, charts, metrics, reports."""
