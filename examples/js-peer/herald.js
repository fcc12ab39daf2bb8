// Tells the news to peers that only follow: protocol /libmesh/follow of mesh.proto.
import { frame } from './wire.js'

const MOST = 64 // followers at once
const SLOW = 1024 * 1024 // bytes that wait for a follower who does not read; then it is told no more

export class Herald {
  #followers = new Map() // peer id → the reader of its stream

  /** Serve one follower, first what it `lacks`, until it leaves. A further stream of the same takes the place of this one. */
  async serve (peer, reader, { records, revocations }) {
    const id = peer.toString()
    this.#followers.get(id)?.stream.abort(new Error('it has asked again'))
    if (this.#followers.size >= MOST) throw new Error('as many follow as there is room for')
    this.#followers.set(id, reader)
    try {
      for (const revocation of revocations) await reader.say('Gossip', { revocation })
      for (const record of records) await reader.say('Gossip', { record })
      await reader.drain()
    } finally {
      if (this.#followers.get(id) === reader) this.#followers.delete(id)
    }
  }

  tell (gossip) {
    for (const { stream } of this.#followers.values()) {
      if (stream.status !== 'open') continue
      if (stream.writeBufferLength > SLOW) stream.abort(new Error('it does not read'))
      else stream.send(frame('Gossip', gossip))
    }
  }
}
