// A peer: the protocols of mesh.proto over js-libp2p.
import { randomBytes } from 'node:crypto'
import { publicKeyFromRaw } from '@libp2p/crypto/keys'
import { peerIdFromPublicKey } from '@libp2p/peer-id'
import { multiaddr } from '@multiformats/multiaddr'
import { Revocations, admit, meshId, publicKey, readToken, same, whyRefused } from './credentials.js'
import { Gate } from './gate.js'
import { Herald } from './herald.js'
import { Members } from './members.js'
import { MANY, createNode } from './node.js'
import { difference } from './summary.js'
import { Reader, SCOPE, decode, encode, has, served, within } from './wire.js'

const AGENT = 'libmesh-js-peer/0.1.0'
const HELLO = '/libmesh/hello/1.0.0'
const SYNC = '/libmesh/sync/1.0.0'
const COMPARE = '/libmesh/compare/1.0.0'
const FOLLOW = '/libmesh/follow/1.0.0'
const PROBE = '/libmesh/probe/1.0.0'
const TUNNEL = '/libmesh/tunnel/1.0.0'

const HELLO_LIMIT = 10 // seconds for a hello
const ANSWER_LIMIT = 0.6 // seconds that a probe's target has, from ProbeAnswer
const PATIENCE = 5 // seconds for other messages
const LOOK_EVERY = 30 // seconds between comparisons with somebody, and attempts to come back

const idOf = (key) => peerIdFromPublicKey(publicKeyFromRaw(key))
const keyOf = (peer) => peer.publicKey.raw

/**
 * Join the mesh of `token`. `services` maps names to `{ scope, serve(reader, accept) }` as in services.js. `tell(event)`
 * hears `{ peer, state, services }` and `{ peer, topic, data }`.
 */
export async function joinMesh (token, { listen = ['/ip4/127.0.0.1/tcp/0'], services = new Map(), tell = () => {} } = {}) {
  const peer = new Peer(readToken(token), services, tell)
  await peer.start(listen)
  return peer
}

class Peer {
  #looking = null
  #herald = new Herald()

  constructor (invite, services, tell) {
    const seed = randomBytes(32)
    this.invite = invite
    this.services = services
    this.tell = tell
    this.mesh = meshId(invite.meshKey)
    this.credential = admit(invite, publicKey(seed))
    this.gate = new Gate()
    this.revoked = new Revocations()
    this.members = new Members({
      seed,
      key: publicKey(seed),
      credential: this.credential,
      mesh: this.mesh,
      revoked: this.revoked,
      publish: (gossip) => this.#publish('peers', encode('Gossip', gossip)),
      news: (gossip) => this.#herald.tell(gossip),
      changed: (key, state, said) => tell({ peer: idOf(key).toString(), state, services: said.services.map(({ name }) => name) })
    })
  }

  get id () {
    return this.node.peerId.toString()
  }

  get addresses () {
    return this.node.getMultiaddrs().map((address) => multiaddr(address.toString().split('/p2p/')[0]))
  }

  async start (listen) {
    this.node = await createNode(this.members.seed, listen, this.gate)
    await this.node.handle(HELLO, served(this.#answerHello), MANY)
    await this.node.handle(SYNC, this.gate.guard(served(this.#answerSync)), MANY)
    await this.node.handle(COMPARE, this.gate.guard(served(this.#answerCompare)), MANY)
    await this.node.handle(FOLLOW, this.gate.guard(served(this.#answerFollow)), MANY)
    await this.node.handle(PROBE, this.gate.guard(served(this.#answerProbe)), MANY)
    await this.node.handle(TUNNEL, this.gate.guard(served(this.#answerTunnel)), MANY)
    const { pubsub } = this.node.services
    pubsub.addEventListener('message', ({ detail }) => this.#hear(detail))
    for (const name of ['peers', 'app']) pubsub.subscribe(this.#topic(name))
    this.node.addEventListener('peer:disconnect', ({ detail }) => this.#gone(detail))
    this.members.announce({ services: this.#offered(), addresses: this.addresses.map((address) => address.bytes) })
    await this.#seek()
    this.#looking = setInterval(() => this.#look(), LOOK_EVERY * 1000)
  }

  /** Say goodbye and stop. */
  async stop () {
    clearInterval(this.#looking)
    await this.#listeners()
    this.members.announce({ leaving: true, services: [] })
    await new Promise((resolve) => setTimeout(resolve, 200)) // for the goodbye to get out
    this.members.stop()
    await this.node.stop()
  }

  /** Until somebody hears what is published, a second at most: gossip begins a moment after the connection. */
  async #listeners () {
    const { pubsub } = this.node.services
    const until = Date.now() + 1000
    while (pubsub.getSubscribers(this.#topic('peers')).length === 0 && Date.now() < until) {
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  #offered () {
    const names = [...this.services.keys()].sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)))
    return names.map((name) => ({ name, scope: this.services.get(name).scope }))
  }

  // ── hello ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Try each contact of the invite until one lets us in. */
  async #seek () {
    let failure = new Error('the invite names nobody to join through')
    for (const { peerKey, addresses } of this.invite.contacts) {
      try {
        return await this.connect(idOf(peerKey), addresses)
      } catch (error) {
        failure = error
      }
    }
    throw failure
  }

  /** Be connected to a peer and admitted by it. `addresses` are binary ones, without its id. */
  async connect (peer, addresses) {
    if (this.gate.credentialOf(peer) !== undefined) return
    const known = addresses.flatMap((bytes) => {
      try {
        return [multiaddr(bytes).encapsulate(`/p2p/${peer}`)]
      } catch { // of a protocol that we do not know
        return []
      }
    })
    const connection = await this.node.dial(known.length > 0 ? known : peer)
    try {
      await within(HELLO_LIMIT, this.#sayHello(connection))
    } catch (error) {
      connection.abort(error)
      throw error
    }
  }

  async #sayHello (connection) {
    const reader = new Reader(await connection.newStream(HELLO))
    await reader.say('Hello', { agent: AGENT, credential: this.credential })
    const reply = await reader.receive('HelloReply')
    if (has(reply, 'refusal')) throw new Error(`the mesh refused this peer: ${reply.refusal}`)
    const why = this.#whyRefused(connection.remotePeer, reply.credential)
    if (why !== null) throw new Error(`${connection.remotePeer} is no member of this mesh: ${why}`)
    this.gate.admit(connection.remotePeer, reply.credential)
    await this.#exchange(reader)
  }

  #answerHello = async (reader, connection) => {
    try {
      await within(HELLO_LIMIT, this.#letIn(reader, connection))
    } catch (error) {
      reader.stream.abort(error)
      if (this.gate.credentialOf(connection.remotePeer) === undefined) await connection.close()
    }
  }

  async #letIn (reader, connection) {
    const { credential } = await reader.receive('Hello')
    const refusal = this.#whyRefused(connection.remotePeer, credential)
    if (refusal !== null) {
      await reader.say('HelloReply', { agent: AGENT, refusal })
      await reader.stream.close()
      await within(1, reader.drain()).catch(() => {}) // leave it the time to read that
      await connection.close()
      return
    }
    await reader.say('HelloReply', { agent: AGENT, credential: this.credential })
    this.gate.admit(connection.remotePeer, credential)
    await this.#answerExchange(reader)
  }

  #whyRefused (peer, credential) {
    if (peer.type !== 'Ed25519') return 'malformed'
    return whyRefused(credential, { mesh: this.mesh, peerKey: keyOf(peer), revoked: this.revoked })
  }

  // ── digests and records ────────────────────────────────────────────────────────────────────────────────────────

  async #exchange (reader, part = null) {
    await reader.say('Digest', this.members.digest(part))
    const digest = await reader.receive('Digest')
    const records = await reader.receive('Records')
    this.#doubt(this.members.hearDigest(digest))
    await reader.say('Records', this.members.lacking(digest, part))
    await reader.stream.close()
    this.#learn(records)
  }

  async #answerExchange (reader) {
    const digest = await reader.receive('Digest')
    this.#doubt(this.members.hearDigest(digest))
    const part = has(digest, 'part') ? digest.part : null
    await reader.say('Digest', this.members.digest(part))
    await reader.say('Records', this.members.lacking(digest, part))
    this.#learn(await reader.receive('Records'))
    await reader.stream.close()
  }

  #answerSync = (reader) => within(PATIENCE, this.#answerExchange(reader))

  #answerCompare = async (reader) => {
    const theirs = await within(PATIENCE, reader.receive('Summary'))
    if (theirs.fingerprint.length !== 16) throw new Error('no fingerprint')
    const { fingerprint, parts } = this.members.summary()
    await reader.say('Summary', same(fingerprint, theirs.fingerprint) ? { fingerprint } : { fingerprint, parts })
    await reader.stream.close()
  }

  /** Compare what we know with a peer, and exchange what differs. */
  async #compare (connection) {
    const mine = this.members.summary()
    let part = null
    try {
      const reader = new Reader(await connection.newStream(COMPARE))
      await reader.say('Summary', { fingerprint: mine.fingerprint })
      const theirs = await reader.receive('Summary')
      await reader.stream.close()
      if (same(theirs.fingerprint, mine.fingerprint)) return
      part = difference(mine.parts, theirs.parts)
    } catch (error) { // it does not speak that
      if (error.name !== 'UnsupportedProtocolError') throw error
    }
    await this.#exchange(new Reader(await connection.newStream(SYNC)), part)
  }

  /** The news, for a peer that only follows, until it leaves or does not read. */
  #answerFollow = async (reader, connection) => {
    const digest = await within(PATIENCE, reader.receive('Digest'))
    await this.#herald.serve(connection.remotePeer, reader, this.members.lacking(digest))
    reader.stream.abort(new Error('it has left'))
  }

  #learn ({ records, revocations }) {
    for (const revocation of revocations) this.#revoke(revocation)
    for (const record of records) attempt(() => this.members.hear(record))
  }

  #revoke (revocation) {
    if (!this.revoked.add(revocation, this.mesh)) return
    this.#publish('peers', encode('Gossip', { revocation }))
    this.#herald.tell({ revocation })
    this.members.expel()
    for (const id of this.gate.admitted) {
      if (!this.revoked.covers(this.gate.credentialOf(id))) continue
      this.gate.shut(id)
      for (const connection of this.node.getConnections().filter(({ remotePeer }) => remotePeer.toString() === id)) {
        connection.abort(new Error('its membership was revoked'))
      }
    }
  }

  /** Now and then: tell a random member what we know; come back if nobody is left. */
  async #look () {
    const ids = this.gate.admitted
    const chosen = ids[Math.floor(Math.random() * ids.length)]
    try {
      if (chosen === undefined) {
        const alive = this.members.rows.filter(({ state }) => state === 'alive')
        const ways = [...alive.map(({ said }) => said), ...this.invite.contacts]
        await Promise.any(ways.map(({ peerKey, addresses }) => this.connect(idOf(peerKey), addresses)))
      } else {
        const [connection] = this.#connections(chosen)
        await within(PATIENCE, this.#compare(connection))
      }
    } catch (error) {
      process.stderr.write(`nobody to talk to now: ${error.message}\n`)
    }
  }

  // ── liveness ───────────────────────────────────────────────────────────────────────────────────────────────────

  #answerProbe = async (reader) => {
    const probe = await within(PATIENCE, reader.receive('Probe'))
    const heard = !has(probe, 'targetKey') || await this.#probe(probe.targetKey, ANSWER_LIMIT)
    await reader.say('ProbeAnswer', { heard })
    await reader.stream.close()
  }

  /** Whether a connected peer answers in time. */
  async #probe (key, seconds) {
    const [connection] = this.#connections(idOf(key))
    if (connection === undefined) return false
    let stream
    try {
      return await within(seconds, (async () => {
        stream = await connection.newStream(PROBE)
        const reader = new Reader(stream)
        await reader.say('Probe', {})
        return (await reader.receive('ProbeAnswer')).heard
      })())
    } catch {
      return false
    } finally {
      stream?.abort(new Error('that was all'))
    }
  }

  /** Find out for ourselves whether these are there: by a probe, or else by a new connection. */
  #doubt (keys) {
    for (const key of keys) {
      this.#probe(key, PATIENCE)
        .then((heard) => heard || this.connect(idOf(key), this.members.get(key)?.said.addresses ?? []))
        .catch(() => this.members.bury(key))
    }
  }

  #gone (peer) {
    this.gate.shut(peer)
    const row = this.members.get(keyOf(peer))
    if (row?.state === 'alive') this.#doubt([row.said.peerKey])
  }

  // ── gossip ─────────────────────────────────────────────────────────────────────────────────────────────────────

  #topic (name) {
    return `libmesh/1/${this.mesh}/${name}`
  }

  #publish (name, data) {
    this.node.services.pubsub.publish(this.#topic(name), data).catch((error) => {
      process.stderr.write(`this could not be published: ${error.message}\n`)
    })
  }

  #hear ({ topic, from, data }) {
    if (topic === this.#topic('peers')) attempt(() => this.#hearGossip(decode('Gossip', data)))
    if (topic === this.#topic('app')) attempt(() => this.#hearPost(from, decode('Post', data)))
  }

  #hearGossip ({ kind, record, revocation, suspicion }) {
    if (kind === 'record') this.members.hear(record)
    if (kind === 'revocation') this.#revoke(revocation)
    if (kind === 'suspicion') this.#doubt(this.members.hearSuspicion(suspicion))
  }

  #hearPost (from, { topic, data }) {
    const isMember = this.members.get(keyOf(from))?.state === 'alive'
    if (isMember) this.tell({ peer: from.toString(), topic, data: Buffer.from(data) })
  }

  /** Say something to everybody who listens to this topic of the application. */
  post (topic, data) {
    this.#publish('app', encode('Post', { topic, data }))
  }

  // ── tunnels ────────────────────────────────────────────────────────────────────────────────────────────────────

  #answerTunnel = async (reader, connection) => {
    const { service } = await within(PATIENCE, reader.receive('Open'))
    const offered = this.services.get(service)
    const allowed = this.gate.credentialOf(connection.remotePeer)?.links.at(-1).scope ?? SCOPE.SCOPE_UNSPECIFIED
    if (offered === undefined) return await this.#refuse(reader, 'unknown_service')
    if (allowed < offered.scope) return await this.#refuse(reader, 'scope')
    let accepted = false
    try {
      await offered.serve(reader, () => {
        accepted = true
        return reader.say('Opened', {})
      })
    } catch (error) {
      if (accepted) throw error
      await this.#refuse(reader, 'unavailable')
    }
  }

  async #refuse (reader, refusal) {
    await reader.say('Opened', { refusal })
    await reader.stream.close()
    await within(PATIENCE, reader.drain())
  }

  /** Open a service of a member: a reader at the first byte of its answer, whose `stream` leads to it. */
  async open (key, service) {
    const row = this.members.get(key)
    await this.connect(idOf(key), row?.said.addresses ?? [])
    const [connection] = this.#connections(idOf(key))
    const reader = new Reader(await connection.newStream(TUNNEL))
    await reader.say('Open', { service })
    const opened = await reader.receive('Opened')
    if (!has(opened, 'refusal')) return reader
    reader.stream.abort(new Error('refused'))
    throw new Error(`it refused the service ${JSON.stringify(service)}: ${opened.refusal}`)
  }

  // ── streams ────────────────────────────────────────────────────────────────────────────────────────────────────

  #connections (peer) {
    return this.node.getConnections().filter(({ remotePeer, status }) => remotePeer.toString() === peer.toString() && status === 'open')
  }
}

function attempt (work) {
  try {
    work()
  } catch { // others' nonsense is no reason to end
  }
}
