// Who has proved itself. Until a peer has, its streams wait here, for at most 5 s: paragraph "Protocols" of mesh.proto.

const HOLD = 5000 // ms

export class Gate {
  #admitted = new Map() // peer id → credential
  #waiting = new Map() // peer id → those who are told when it is admitted

  get admitted () {
    return [...this.#admitted.keys()]
  }

  credentialOf (peer) {
    return this.#admitted.get(peer.toString())
  }

  admit (peer, credential) {
    const id = peer.toString()
    this.#admitted.set(id, credential)
    for (const tell of this.#waiting.get(id) ?? []) tell(true)
    this.#waiting.delete(id)
  }

  /** It is gone, or a stranger from now on. */
  shut (peer) {
    const id = peer.toString()
    this.#admitted.delete(id)
    for (const tell of this.#waiting.get(id) ?? []) tell(false)
    this.#waiting.delete(id)
  }

  /** Whether this peer is admitted, or will be in time. */
  async admits (peer) {
    const id = peer.toString()
    if (this.#admitted.has(id)) return true
    return await new Promise((resolve) => {
      const waiting = this.#waiting.get(id) ?? new Set()
      this.#waiting.set(id, waiting.add(resolve))
      setTimeout(() => {
        waiting.delete(resolve)
        resolve(false)
      }, HOLD)
    })
  }

  /** A stream handler that serves members only. */
  guard (handler) {
    return async (stream, connection) => {
      if (!this.#admitted.has(connection.remotePeer.toString())) {
        stream.pause() // what a stranger sends stays with the stranger
        if (!await this.admits(connection.remotePeer)) {
          stream.abort(new Error('no hello'))
          return
        }
        if (stream.readStatus === 'paused') stream.resume()
      }
      await handler(stream, connection)
    }
  }

  /** A registrar for services of libp2p, gossipsub above all, that are to see members only. */
  registrar (registrar) {
    return new Proxy(registrar, {
      get: (target, name) => {
        if (name === 'handle') return (protocol, handler, options) => target.handle(protocol, this.guard(handler), options)
        if (name === 'register') return (protocol, topology) => target.register(protocol, this.#watched(topology))
        const value = target[name]
        return typeof value === 'function' ? value.bind(target) : value
      }
    })
  }

  #watched (topology) {
    return {
      ...topology,
      onConnect: async (peer, connection) => {
        if (await this.admits(peer)) topology.onConnect(peer, connection)
      }
    }
  }
}
