"""Long continuations of a quantised model beside its base's: what short answers hide."""
