"""Made-up recordings and drawn faces in the real datasets' formats: the data of the demo and the tests."""
