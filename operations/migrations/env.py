"""Where Alembic finds the store: the connection that `operations.store.migrate` hands it."""

from alembic import context

from operations.store import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
