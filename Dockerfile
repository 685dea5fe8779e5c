# A server of pumice-tiny on a CPU:
#   docker build -t pumice . && docker run -p 8000:8000 -v pumice-cache:/cache pumice
# Another model: docker run ... -v /my/model:/model pumice pumice serve --host 0.0.0.0 --model /model
# Where there is no container engine, .ci/dockerfile.py runs these steps in a folder of their own.
FROM python:3.12-slim
# For the code that is compiled for the processor at hand.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/pumice
COPY constraints.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$(sed -n 's/^torch==//p' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip install --no-cache-dir -c constraints.txt '.[serve]'
ENV PUMICE_CACHE=/cache
VOLUME /cache
EXPOSE 8000
HEALTHCHECK CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"
CMD ["pumice", "serve", "--host", "0.0.0.0"]
