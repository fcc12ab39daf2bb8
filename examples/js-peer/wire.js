// Messages as mesh.proto has them, and frames on streams: paragraph "Framing" of mesh.proto.
import Long from 'long'
import protobuf from 'protobufjs'
import { Uint8ArrayList } from 'uint8arraylist'

protobuf.util.Long = Long // numbers of 64 bits would lose their lowest ones
protobuf.configure()

const root = protobuf.loadSync(new URL('../../proto/libmesh/v1/mesh.proto', import.meta.url).pathname)
const type = (name) => root.lookupType(`libmesh.v1.${name}`)

export const SCOPE = root.lookupEnum('libmesh.v1.Scope').values
export const KIND = root.lookupEnum('libmesh.v1.LinkKind').values

const KIB = 1024
const LIMITS = { // bytes, from the messages' comments
  Hello: 4 * KIB,
  HelloReply: 4 * KIB,
  Digest: KIB * KIB,
  Records: 8 * KIB * KIB,
  Summary: KIB,
  Gossip: 60 * KIB,
  Record: 60 * KIB,
  Announcement: 60 * KIB,
  Probe: KIB,
  ProbeAnswer: KIB,
  Open: KIB,
  Opened: KIB,
  Post: 60 * KIB
}

const HELD = 256 * KIB // bytes that a Reader keeps for somebody who does not read; then the other side waits

export const has = (message, field) => Object.hasOwn(message, field)
export const big = (long) => BigInt(long.toString())
export const u64 = (number) => Long.fromString(number.toString(), true)

export function decode (name, data) {
  if (data.length > (LIMITS[name] ?? Infinity)) throw new Error(`a ${name} of ${data.length} bytes`)
  return type(name).decode(data)
}

export const encode = (name, value) => type(name).encode(type(name).create(value)).finish()

export function frame (name, value) {
  const data = encode(name, value)
  const length = []
  for (let rest = data.length; ; rest >>= 7) {
    length.push(rest > 0x7f ? (rest & 0x7f) | 0x80 : rest)
    if (rest <= 0x7f) return Buffer.concat([Buffer.from(length), data])
  }
}

/** What comes on a stream: messages first, then whatever follows them. The only one who listens to the stream. */
export class Reader {
  #held = new Uint8ArrayList()
  #failure = null
  #wake = () => {}

  constructor (stream) {
    this.stream = stream
    stream.addEventListener('message', ({ data }) => {
      this.#held.append(data)
      if (this.#held.byteLength > HELD && stream.readStatus === 'readable') stream.pause()
      this.#wake()
    })
    stream.addEventListener('end', () => this.#wake())
    stream.addEventListener('close', ({ error }) => {
      this.#failure = error ?? null
      this.#wake()
    })
  }

  /** Some bytes; null at the end. Throws if the stream was reset. */
  async some () {
    while (this.#held.byteLength === 0) {
      if (this.#failure !== null) throw this.#failure
      // "Ended" may be said already of what was put back after the negotiation of the protocol.
      const { readableEnded, readBufferLength, status } = this.stream
      if (status !== 'open' || (readableEnded && readBufferLength === 0)) return null
      if (this.stream.readStatus === 'paused') this.stream.resume()
      else await new Promise((resolve) => { this.#wake = resolve })
    }
    const data = this.#held.slice()
    this.#held.consume(data.length)
    return data
  }

  async exactly (count) {
    const got = new Uint8ArrayList()
    while (got.byteLength < count) {
      const data = await this.some()
      if (data === null) throw new Error('the stream ended within a message')
      got.append(data)
    }
    if (got.byteLength > count) this.#held.prepend(got.slice(count))
    return got.slice(0, count)
  }

  /** The next message. Throws if what comes is none, or is longer than allowed. */
  async receive (name) {
    let length = 0
    for (let bytes = 1; ; bytes++) {
      const [byte] = await this.exactly(1)
      length += (byte & 0x7f) * 2 ** (7 * (bytes - 1))
      if (byte < 0x80) break
      if (bytes === 4) throw new Error(`the length of a ${name} has more than 4 bytes`)
    }
    if (length > LIMITS[name]) throw new Error(`a ${name} of ${length} bytes`)
    return decode(name, await this.exactly(length))
  }

  /** Send, and wait while the other side does not read. */
  async send (data) {
    if (!this.stream.send(data)) await this.stream.onDrain()
  }

  say (name, value) {
    return this.send(frame(name, value))
  }

  /** Read to the end, and drop it. */
  async drain () {
    while (await this.some() !== null);
  }
}

/** A stream handler of one that answers a reader, and resets the stream if that fails. */
export function served (answer) {
  return async (stream, connection) => {
    try {
      await answer(new Reader(stream), connection)
    } catch (error) {
      stream.abort(error)
    }
  }
}

/** The outcome of a promise, or an error after so many seconds. */
export async function within (seconds, promise) {
  let timer
  const late = new Promise((resolve, reject) => {
    timer = setTimeout(() => reject(new Error(`nothing came within ${seconds} s`)), seconds * 1000)
  })
  try {
    return await Promise.race([promise, late])
  } finally {
    clearTimeout(timer)
  }
}
