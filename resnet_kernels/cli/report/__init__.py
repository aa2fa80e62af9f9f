"""The command `report`: a results file as a page with plots."""
