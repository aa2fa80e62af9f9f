"""Code that several test files share. pytest's `pythonpath` has the folder of tests, so that it is imported as `helpers`."""
