// Who is in the mesh: the newest announcement of each peer, and what is said of them. Messages Announcement, Record,
// Digest and Suspicion of mesh.proto. Decides; others carry its words.
import { hex, isRecordSigned, same, signRecord, whyRefused } from './credentials.js'
import { covers, summary } from './summary.js'
import { SCOPE, big, decode, encode, u64 } from './wire.js'

const MOST_PEERS = 4096
const REFUTE_EVERY = 500 // ms between two announcements that refute: bounds what a liar can make us say
const FAR_AHEAD = 365n * 86_400_000n // ms: nobody's clock is a year ahead; such incarnations are lies
const CONTROL = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/

const bytes = (text) => Buffer.from(text)
const isNewer = (a, b) => a[0] > b[0] || (a[0] === b[0] && a[1] > b[1])

function isWellFormed ({ peerKey, services, addresses, attributes }) {
  return peerKey.length === 32 && services.length <= 256 && addresses.length <= 16 && attributes.length <= 48 * 1024 &&
    addresses.every((address) => address.length <= 255) &&
    services.every(({ name, scope }, i) => {
      const length = bytes(name).length
      const inOrder = i === 0 || Buffer.compare(bytes(services[i - 1].name), bytes(name)) < 0
      const isScope = scope >= SCOPE.SCOPE_CLIENT && scope <= SCOPE.SCOPE_INVITE
      return length >= 1 && length <= 255 && !CONTROL.test(name) && inOrder && isScope
    })
}

/**
 * The table. `publish(gossip)` is called with what is to be said to everybody, `news(gossip)` with all that is new here, and
 * `changed(key, state, announcement)` when what is believed of a peer changes: "alive", "left" or "dead".
 */
export class Members {
  #rows = new Map() // hex key → { said, age, record, state }
  #saying = null

  constructor ({ seed, key, credential, mesh, revoked, publish, news, changed }) {
    Object.assign(this, { key, mesh, revoked, news, changed })
    this.publish = publish
    this.seed = seed
    this.me = { peerKey: key, credential, incarnation: BigInt(Date.now()), sequence: 0n, services: [], addresses: [] }
    this.#seal()
  }

  get rows () {
    return [...this.#rows.values()]
  }

  get (key) {
    return this.#rows.get(hex(key))
  }

  /** Say this of ourselves from now on. */
  announce (change) {
    Object.assign(this.me, change)
    this.#seal()
    this.publish({ record: this.record })
    this.news({ record: this.record })
  }

  #seal () {
    this.me.sequence += 1n
    const { incarnation, sequence } = this.me
    const body = encode('Announcement', { ...this.me, incarnation: u64(incarnation), sequence: u64(sequence) })
    this.record = { body, signature: signRecord(this.seed, body) }
  }

  /** Somebody believes something of us that outdoes what we say: speak with a higher incarnation, unless it is a lie. */
  #outbid (incarnation) {
    if (incarnation < this.me.incarnation || incarnation > BigInt(Date.now()) + FAR_AHEAD) return
    this.me.incarnation = incarnation + 1n
    this.#saying ??= setTimeout(() => {
      this.#saying = null
      this.announce({})
    }, REFUTE_EVERY)
  }

  /** Believe a record, if it is good and newer than what we have. */
  hear (record) {
    const said = decode('Announcement', record.body)
    const age = [big(said.incarnation), big(said.sequence)]
    if (!isWellFormed(said)) return
    if (same(said.peerKey, this.key)) {
      if (isNewer(age, [this.me.incarnation, this.me.sequence]) && this.#isGood(said, record)) this.#outbid(age[0])
      return
    }
    const known = this.get(said.peerKey)
    const later = known?.state === 'alive' ? known && isNewer(age, known.age) : known && age[0] > known.age[0]
    if (known ? !later : this.#rows.size >= MOST_PEERS) return
    if (!this.#isGood(said, record)) return
    const state = said.leaving ? 'left' : 'alive'
    this.#rows.set(hex(said.peerKey), { said, age, record, state })
    this.news({ record })
    if (state !== known?.state) this.changed(said.peerKey, state, said)
  }

  #isGood ({ peerKey, credential }, record) {
    const { mesh, revoked } = this
    return whyRefused(credential, { mesh, peerKey, revoked }) === null && isRecordSigned(peerKey, record)
  }

  /** Nothing is heard of this peer. Nobody but the one who looked for it in vain may say so. */
  bury (key) {
    const row = this.get(key)
    if (row?.state !== 'alive') return
    row.state = 'dead'
    this.news({ suspicion: { peerKey: key, incarnation: u64(row.age[0]), sequence: u64(row.age[1]) } })
    this.changed(key, 'dead', row.said)
  }

  /** What is known of each peer, or of those in `part`. */
  digest (part = null) {
    const rows = this.rows.map(({ said, age, state }) => [said.peerKey, age, state === 'dead'])
    rows.push([this.key, [this.me.incarnation, this.me.sequence], false])
    const entries = rows.filter(([peerKey]) => covers(part, peerKey)).map(([peerKey, [incarnation, sequence], dead]) => (
      { peerKey, incarnation: u64(incarnation), sequence: u64(sequence), dead }
    ))
    return part === null ? { entries } : { entries, part }
  }

  summary () {
    return summary(this.digest(), this.revoked.rows)
  }

  /** What somebody with this digest lacks, of this part. Of the dead nothing is told. */
  lacking (digest, part = null) {
    const ages = new Map(digest.entries.map((entry) => [hex(entry.peerKey), [big(entry.incarnation), big(entry.sequence)]]))
    const lacks = (key, age) => covers(part, key) && (!ages.has(hex(key)) || isNewer(age, ages.get(hex(key))))
    const records = this.rows.filter(({ said, age, state }) => state !== 'dead' && lacks(said.peerKey, age))
    const mine = lacks(this.key, [this.me.incarnation, this.me.sequence]) ? [this.record] : []
    const revocations = part === null || part.revocations ? this.revoked.all : []
    return { records: [...mine, ...records.map(({ record }) => record)], revocations }
  }

  /** The keys of those whom we should look for: this digest calls them dead. */
  hearDigest ({ entries }) {
    const doubted = []
    for (const { peerKey, dead, ...entry } of entries) {
      const age = [big(entry.incarnation), big(entry.sequence)]
      if (same(peerKey, this.key)) {
        if (dead || isNewer(age, [this.me.incarnation, this.me.sequence])) this.#outbid(age[0])
      } else if (dead && this.#isAliveAt(peerKey, age)) doubted.push(peerKey)
    }
    return doubted.slice(0, 16)
  }

  /** The same for a suspicion. */
  hearSuspicion ({ peerKey, incarnation, sequence }) {
    const age = [big(incarnation), big(sequence)]
    if (!same(peerKey, this.key)) return this.#isAliveAt(peerKey, age) ? [peerKey] : []
    if (!isNewer([this.me.incarnation, this.me.sequence], age)) this.#outbid(age[0])
    return []
  }

  #isAliveAt (key, age) {
    const row = this.get(key)
    return row?.state === 'alive' && !isNewer(row.age, age)
  }

  /** A link was revoked: the keys of those who are members no more. */
  expel () {
    const out = this.rows.filter(({ said, state }) => state === 'alive' && this.revoked.covers(said.credential))
    for (const { said } of out) this.bury(said.peerKey)
    return out.map(({ said }) => said.peerKey)
  }

  stop () {
    clearTimeout(this.#saying)
  }
}
