-- wrk -t1 -s wrk.lua URL -- FILE [RATE]
-- Posts the lines of FILE, one after the other and over again, and prints the result as JSON. A connection posts as
-- soon as it has its last answer. With a RATE, in requests/s, it also waits until the next request is due.
local ffi = require("ffi")
ffi.cdef("typedef struct { long seconds, microseconds; } timeval; int gettimeofday(timeval *, void *);")

local requests, sent, planned = {}, 0, 0
local time, start, interval = ffi.new("timeval")
latest = 0 -- how late a request was sent at most, in ms; global, so that done() can get it

local function now() -- in ms
  ffi.C.gettimeofday(time, nil)
  return tonumber(time.seconds) * 1e3 + tonumber(time.microseconds) / 1e3
end

local function wait() -- in ms, until a free connection may call request()
  start, planned = start or now(), planned + 1
  return math.max(0, math.ceil(start + planned * interval - now()))
end

function setup(thread)
  sender = thread
end

function init(args)
  for body in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, { ["Content-Type"] = "application/json" }, body)
  end
  if args[2] then
    interval, delay = 1e3 / args[2], wait -- wrk asks a global delay() before each request
  end
end

function request() -- wrk calls it once before the start, to see what it returns
  if start then
    latest = math.max(latest, now() - start - sent * interval)
  end
  sent = sent + 1
  return requests[(sent - 1) % #requests + 1]
end

function done(summary, latency)
  local errors = 0
  for _, count in pairs(summary.errors) do
    errors = errors + count
  end
  print(string.format(
    '{"requests": %d, "seconds": %f, "errors": %d, "p50": %f, "p99": %f, "longest": %f, "latest": %f}',
    summary.requests, summary.duration / 1e6, errors, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, sender:get("latest")))
end
