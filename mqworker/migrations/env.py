"""What Alembic runs its migrations in: the connection and the transaction of who asked for them."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
