// Keys, chains, tokens and revocations: the messages Link, Credential, Invite and Revocation of mesh.proto.
import { createHash, createPrivateKey, createPublicKey, sign as edSign, verify as edVerify } from 'node:crypto'
import { KIND, SCOPE, big, decode, has } from './wire.js'

const LINK = Buffer.from('libmesh link 1\0')
const REVOCATION = Buffer.from('libmesh revocation 1\0')
const RECORD = Buffer.from('libmesh announcement 1\0')
const NO_END = 2n ** 64n - 1n
const MOST_LINKS = 8
const TOLERANCE = 30 // seconds after its end that a link is still taken

// RFC 8410: what stands before the 32 bytes of a key.
const PRIVATE = Buffer.from('302e020100300506032b657004220420', 'hex')
const PUBLIC = Buffer.from('302a300506032b6570032100', 'hex')

const sha256 = (data) => createHash('sha256').update(data).digest()
const privateKey = (seed) => createPrivateKey({ key: Buffer.concat([PRIVATE, seed]), format: 'der', type: 'pkcs8' })
const sign = (seed, data) => edSign(null, data, privateKey(seed))

export const hex = (bytes) => Buffer.from(bytes).toString('hex')
export const same = (a, b) => Buffer.compare(a, b) === 0
export const meshId = (meshKey) => hex(sha256(meshKey).subarray(0, 16))
export const publicKey = (seed) => createPublicKey(privateKey(seed)).export({ format: 'der', type: 'spki' }).subarray(12)
export const signRecord = (seed, body) => sign(seed, Buffer.concat([RECORD, body]))
export const isRecordSigned = (key, { body, signature }) => isSigned(key, Buffer.concat([RECORD, body]), signature)

function isSigned (key, data, signature) {
  if (key.length !== 32 || signature.length !== 64) return false
  return edVerify(null, data, createPublicKey({ key: Buffer.concat([PUBLIC, key]), format: 'der', type: 'spki' }), signature)
}

const endOf = (link) => has(link, 'notAfter') ? big(link.notAfter) : NO_END
const linkId = (link) => hex(sha256(link.signature).subarray(0, 16))

function signedBytes (meshKey, issuer, link) {
  const tail = Buffer.alloc(10)
  tail.writeUInt8(link.kind, 0)
  tail.writeUInt8(link.scope, 1)
  tail.writeBigUInt64BE(endOf(link), 2)
  return Buffer.concat([LINK, meshKey, issuer, link.subject, tail])
}

/** The token as an Invite. Throws words for people. */
export function readToken (token) {
  if (!token.startsWith('lm1')) throw new Error("this is no invite: a token starts with 'lm1'")
  const data = Buffer.from(token.slice(3), 'base64url')
  const body = data.subarray(0, -4)
  if (data.length <= 4 || !same(sha256(body).subarray(0, 4), data.subarray(-4))) {
    throw new Error('the invite is mistyped or cut off; copy it again, whole')
  }
  return decode('Invite', body)
}

/** Sign the peer with this key in, with all that the invite gives. */
export function admit (invite, peerKey) {
  const last = invite.links.at(-1)
  const link = { subject: peerKey, kind: KIND.LINK_KIND_PEER, scope: last.scope }
  if (has(last, 'notAfter')) link.notAfter = last.notAfter
  link.signature = sign(invite.seed, signedBytes(invite.meshKey, publicKey(invite.seed), link))
  return { meshKey: invite.meshKey, links: [...invite.links, link] }
}

/** Why `peerKey` is no member by this credential, as a word of HelloReply.refusal; null if it is one. */
export function whyRefused (credential, { mesh, peerKey, revoked, now = Date.now() / 1000 }) {
  const links = credential?.links ?? []
  if (links.length < 1 || links.length > MOST_LINKS || credential.meshKey.length !== 32) return 'malformed'
  if (links.some((link) => link.subject.length !== 32 || link.signature.length !== 64)) return 'malformed'
  if (links.some(({ scope }) => scope < SCOPE.SCOPE_CLIENT || scope > SCOPE.SCOPE_INVITE)) return 'malformed'
  if (meshId(credential.meshKey) !== mesh) return 'wrong_mesh'
  const kinds = links.map((link) => link.kind)
  if (kinds.pop() !== KIND.LINK_KIND_PEER || kinds.some((kind) => kind !== KIND.LINK_KIND_INVITE)) return 'malformed'
  if (!same(links.at(-1).subject, peerKey)) return 'not_yours'
  if (isWidened(links)) return 'widened'
  if (links.some((link) => endOf(link) !== NO_END && now >= Number(endOf(link)) + TOLERANCE)) return 'expired'
  if (revoked.covers(credential)) return 'revoked'
  return isChainSigned(credential.meshKey, links) ? null : 'forged'
}

function isWidened (links) {
  return links.some((link, i) => {
    const above = links[i - 1]
    if (above === undefined) return false
    const invites = link.kind === KIND.LINK_KIND_INVITE && above.scope !== SCOPE.SCOPE_INVITE
    return link.scope > above.scope || endOf(link) > endOf(above) || invites
  })
}

function isChainSigned (meshKey, links) {
  return links.every((link, i) => {
    const issuer = i === 0 ? meshKey : links[i - 1].subject
    return isSigned(issuer, signedBytes(meshKey, issuer, link), link.signature)
  })
}

/** The revocations that are known, all of them good. */
export class Revocations {
  #byLink = new Map() // link id → revocations, each with the key that signed it

  get all () {
    return [...this.#byLink.values()].flat().map(({ revocation }) => revocation)
  }

  /** Each as the link's id and the key that signed it: what Summary's fingerprint is over. */
  get rows () {
    return [...this.#byLink].flatMap(([id, known]) => known.map(({ key }) => Buffer.concat([Buffer.from(id, 'hex'), key])))
  }

  /** Remember one. Whether it is good and new. */
  add (revocation, mesh) {
    const { meshKey, links, signer, signature } = revocation
    if (links.length < 1 || links.length > MOST_LINKS || signer >= links.length || this.all.length >= 1024) return false
    if (meshKey.length !== 32 || meshId(meshKey) !== mesh || isWidened(links)) return false
    const key = signer === 0 ? meshKey : links[signer - 1].subject
    const id = linkId(links.at(-1))
    const known = this.#byLink.get(id) ?? []
    if (known.some((each) => same(each.key, key))) return false
    const signed = Buffer.concat([REVOCATION, meshKey, Buffer.from(id, 'hex')])
    if (!isSigned(key, signed, signature) || !isChainSigned(meshKey, links)) return false
    this.#byLink.set(id, [...known, { key, revocation }])
    return true
  }

  /** Whether a link of this credential was taken back by a key above it. */
  covers ({ meshKey, links }) {
    return links.some((link, i) => {
      const above = [meshKey, ...links.slice(0, i).map(({ subject }) => subject)]
      return this.#byLink.get(linkId(link))?.some(({ key }) => above.some((each) => same(each, key)))
    })
  }
}
