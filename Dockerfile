# eventflow with its Kafka, S3 and Postgres extras, run by an unprivileged user. compose.yaml builds it.
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 eventflow && mkdir /data && chown eventflow /data
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY eventflow ./eventflow
COPY triggers ./triggers
RUN pip install --no-cache-dir '.[kafka,s3,postgres]'
COPY examples ./examples

USER eventflow
ENTRYPOINT ["eventflow"]
CMD ["--help"]
